# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The flags in float64: pure functions of the gradient g, the direction u and the weights x."""

from types import SimpleNamespace

import torch


DEFAULTS = {
    "centralize": False,
    "cautious": False,
    "cautious_floor": 1e-3,
    "decay": "decoupled",
    "lookahead": False,
    "lookahead_k": 5,
    "lookahead_alpha": 0.5,
}


def split(options):
    """The flags around a rule, and the options that its oracle gets (those of `ratio` among them)."""
    around = SimpleNamespace(**{k: options.get(k, default) for k, default in DEFAULTS.items()})
    return around, {k: v for k, v in options.items() if k not in DEFAULTS}


def ratio(denominator="eps", eps=1e-8, atan2_a=1.27, atan2_b=1.0):
    """How numerator and denominator meet (arXiv 2407.05872 for atan2)."""
    if denominator == "atan2":
        return lambda num, den: atan2_a * torch.atan2(num, atan2_b * den)
    return lambda num, den: num / (den + eps)


def centralize(g):
    """arXiv 2004.01461: every output unit's gradient minus its mean, unless the unit has a single weight."""
    if g.dim() < 2 or g.numel() in (0, len(g)):
        return g
    rows = g.reshape(len(g), -1)
    return (rows - rows.sum(1, keepdim=True) / rows.shape[1]).reshape(g.shape)


def cautious(u, g, floor):
    """arXiv 2411.16085, with the mean over the components where neither u nor g is 0."""
    phi = ((u > 0) & (g > 0)) | ((u < 0) & (g < 0))
    live = (u != 0) & (g != 0)
    share = phi.sum().item() / max(live.sum().item(), 1)
    return torch.where(phi, u / max(share, floor), 0.0)


def decay_mask(x, u, decay):
    """arXiv 2510.12402: decay where u moves x towards 0 or not at all."""
    if decay == "decoupled":
        return 1.0
    opposed = ((u > 0) & (x < 0)) | ((u < 0) & (x > 0))
    return (~opposed).double()


CASES = [
    {"centralize": True},
    {"eps": 0.1},
    {"denominator": "atan2"},
    {"denominator": "atan2", "atan2_a": 2.0, "atan2_b": 3.0},
    {"cautious": True},
    {"cautious": True, "cautious_floor": 0.95},
    {"decay": "cautious"},
    {"lookahead": True},
    {"lookahead": True, "lookahead_k": 3, "lookahead_alpha": 0.8},
]
