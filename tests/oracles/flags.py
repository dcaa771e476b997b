# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The flags in float64: functions of the gradient g, the direction u and the weights x, in the order of the stages."""

import math
from types import SimpleNamespace

import torch


DEFAULTS = {
    "centralize": False,
    "centralize_on": "gradient",
    "agc": False,
    "agc_clip": 0.01,
    "agc_eps": 1e-3,
    "soft_clip": False,
    "soft_clip_scale": 1.0,
    "soft_clip_floor": 1e-3,
    "normalize": False,
    "normalize_scale": "norm",
    "cautious": False,
    "cautious_floor": 1e-3,
    "trust_ratio": False,
    "trust_floor": 1e-3,
    "trust_clip": None,
    "trust_vectors": False,
    "trust_on": "update",
    "decay": "decoupled",
    "stable_cap": 0.1,
    "cpr_reg": "l2",
    "cpr_init": "inflection_point",
    "cpr_kappa": 1.0,
    "cpr_steps": 200,
    "cpr_rate": 1.0,
    "cpr_cap": 0.5,
    "lookahead": False,
    "lookahead_k": 5,
    "lookahead_alpha": 0.5,
}


def split(options):
    """The flags around a rule, and the options that its oracle gets (those of `ratio` among them)."""
    around = SimpleNamespace(**{k: options.get(k, default) for k, default in DEFAULTS.items()})
    return around, {k: v for k, v in options.items() if k not in DEFAULTS}


# ---- gradient ------------------------------------------------------------------------------------------------------
def gradient(g, x, on, weight_decay):
    """What the rule sees."""
    if on.centralize and on.centralize_on == "gradient":
        g = centralize(g)
    if on.agc:
        g = agc(g, x, on.agc_clip, on.agc_eps)
    if on.soft_clip:
        g = soft_clip(g, x, on.soft_clip_scale, on.soft_clip_floor)
    if on.normalize:
        g = normalize(g, on.normalize_scale)
    if on.trust_ratio and on.trust_on == "gradient":
        g = trust(g, x, on)
    return g + weight_decay * x if on.decay == "coupled" else g


def centralize(g):
    """arXiv 2004.01461: every output unit's gradient minus its mean, unless the unit has a single weight."""
    if g.dim() < 2 or g.numel() in (0, len(g)):
        return g
    rows = g.reshape(len(g), -1)
    return (rows - rows.sum(1, keepdim=True) / rows.shape[1]).reshape(g.shape)


def units(a):
    """One row per output unit; vectors and scalars are one unit."""
    return a.reshape(len(a), -1) if a.dim() > 1 else a.reshape(1, -1)


def agc(g, x, clip, eps):
    """arXiv 2102.06171, unit by unit."""
    new = []
    for g_i, x_i in zip(units(g), units(x)):
        W, G = max(x_i.norm().item(), eps), g_i.norm().item()
        new.append(g_i * clip * W / G if G > clip * W else g_i)
    return torch.stack(new).reshape(g.shape)


def soft_clip(g, x, scale, floor):
    """Every unit scaled down to the root mean square of its weights."""
    new = []
    for g_i, x_i in zip(units(g), units(x)):
        a, b = max(rms(x_i), floor), rms(g_i)
        new.append(g_i * min(b, scale * a) / b if b else g_i)
    return torch.stack(new).reshape(g.shape)


def normalize(g, scale):
    size = rms(g) if scale == "rms" else g.norm().item()
    return g / size if size else g


def rms(a):
    return math.sqrt(a.square().sum().item() / a.numel())


# ---- ratio ---------------------------------------------------------------------------------------------------------
def ratio(denominator="eps", eps=1e-8, atan2_a=1.27, atan2_b=1.0, softplus_beta=50.0, softplus_bias="inside"):
    """How numerator and denominator meet: arXiv 2407.05872 for atan2, arXiv 1908.00700 for softplus.

    `correction` is what the root of the average was divided by for its bias.
    """

    def softplus(num, den, correction=1.0):
        c = correction if softplus_bias == "outside" else 1.0
        z = softplus_beta * c * den
        return num * c * softplus_beta / (z + torch.log1p(torch.exp(-z)))  # ln(1 + e^z) = z + ln(1 + e^-z)

    return {
        "eps": lambda num, den, correction=1.0: num / (den + eps),
        "atan2": lambda num, den, correction=1.0: atan2_a * torch.atan2(num, atan2_b * den),
        "softplus": softplus,
    }[denominator]


# ---- update --------------------------------------------------------------------------------------------------------
def update(u, g, on):
    """The rule's direction with what is done to it."""
    if on.centralize and on.centralize_on == "update":
        u = centralize(u)
    return cautious(u, g, on.cautious_floor) if on.cautious else u


def cautious(u, g, floor):
    """arXiv 2411.16085, with the mean over the components where g is not 0."""
    phi = ((u > 0) & (g > 0)) | ((u < 0) & (g < 0))
    share = phi.sum().item() / max((g != 0).sum().item(), 1)
    return torch.where(phi, u / max(share, floor), 0.0)


# ---- decay and step ------------------------------------------------------------------------------------------------
def decay(x, u, alpha, weight_decay, on, gain):
    """What decay adds to the direction; `gain` is that of stable decay."""
    if on.decay in ("coupled", "cpr"):
        return 0.0
    if on.decay == "stable":  # arXiv 2011.11152, of which a step takes off `stable_cap` at most
        share = alpha * weight_decay * gain
        return x * (weight_decay * gain if share <= on.stable_cap else on.stable_cap / alpha)
    if on.decay == "cautious":  # arXiv 2510.12402: where u moves x towards 0 or not at all
        opposed = ((u > 0) & (x < 0)) | ((u < 0) & (x > 0))
        return weight_decay * torch.where(opposed, 0.0, x)
    return weight_decay * x


def stable_gain(oracles, xs):
    """One over the root mean of v_hat over all weights of the model; a rule without one knows its gain."""
    if hasattr(oracles[0], "gain"):
        return oracles[0].gain()
    total = sum(oracle.second_moment().mean().item() * x.numel() for oracle, x in zip(oracles, xs))
    mean = total / sum(x.numel() for x in xs)
    return 1 / math.sqrt(mean) if mean else 0.0


def trust(q, x, on):
    """arXiv 1904.00962: phi(||x||) / ||q||, with phi(z) = max(z, trust_floor sqrt(n)), of matrices."""
    if x.dim() < 2 and not on.trust_vectors:
        return q
    top, bottom = max(x.norm().item(), on.trust_floor * math.sqrt(x.numel())), q.norm().item()
    r = top / bottom if top and bottom else 1.0
    return q * (r if on.trust_clip is None else min(r, on.trust_clip))


# ---- parameter -----------------------------------------------------------------------------------------------------
class CPR:
    """arXiv 2311.09058 as in the authors' code: after the optimizer's step, without the learning rate; of a matrix."""

    def __init__(self, on):
        self.on, self.kappa, self.lam, self.t = on, None, 0.0, 0
        self.average, self.looks = None, []

    def __call__(self, new, old):
        on, (R, dR) = self.on, regulariser(new, self.on.cpr_reg)
        self.t += 1
        if self.kappa is None:
            self.kappa = self.bound(R, old)
        if self.kappa is not None:
            self.lam = max(0.0, self.lam + on.cpr_rate * (R - self.kappa))
        taken, most = self.lam * dR, on.cpr_cap * new.norm().item()
        size = taken.norm().item()
        return new - taken * (most / size if size > most else 1.0)

    def bound(self, R, old):
        """kappa, or None as long as it is not known."""
        on = self.on
        if on.cpr_init == "uniform":
            return on.cpr_kappa
        if on.cpr_init == "dependent":
            first = regulariser(old, on.cpr_reg)[0]
            return on.cpr_kappa * first if self.t == 1 and first else None
        if on.cpr_init == "warm_start":
            return R if self.t == on.cpr_steps else None
        self.average = R if self.t == 1 else 0.99 * self.average + 0.01 * R
        if self.t % on.cpr_steps:
            return None
        self.looks.append(self.average)
        if len(self.looks) < 3:
            return None
        a, b, c = self.looks[-3:]
        return R if b - a > c - b else None


def regulariser(x, kind):
    """R and its gradient; the authors' sums over n, their standard deviation as it is."""
    n = x.numel()
    if kind == "l2":
        return x.square().sum().item() / n, 2 * x
    if kind == "l1":
        return x.abs().sum().item() / n, torch.sign(x)
    if kind == "huber":
        inner = x.abs() < 1
        return torch.where(inner, x**2 / 2, x.abs() - 0.5).sum().item() / n, torch.where(inner, x, torch.sign(x))
    off = x - x.sum() / n
    std = math.sqrt(off.square().sum().item() / max(n - 1, 1))
    return std, off / ((n - 1) * std) if std else 0 * x


CASES = [
    {"centralize": True},
    {"centralize": True, "centralize_on": "update"},
    {"agc": True},
    {"agc": True, "agc_clip": 0.4, "agc_eps": 2.0},
    {"soft_clip": True},
    {"soft_clip": True, "soft_clip_scale": 0.1, "soft_clip_floor": 2.0},
    {"normalize": True},
    {"normalize": True, "normalize_scale": "rms"},
    {"eps": 0.1},
    {"denominator": "atan2"},
    {"denominator": "atan2", "atan2_a": 2.0, "atan2_b": 3.0},
    {"denominator": "softplus"},
    {"denominator": "softplus", "softplus_beta": 2.0},
    {"denominator": "softplus", "softplus_bias": "outside"},
    {"cautious": True},
    {"cautious": True, "cautious_floor": 0.95},
    {"trust_ratio": True},
    {"trust_ratio": True, "trust_floor": 2.0, "trust_clip": 1.5, "trust_vectors": True},
    {"trust_ratio": True, "trust_floor": 0.0, "trust_vectors": True},
    {"trust_ratio": True, "trust_on": "gradient"},
    {"decay": "cautious"},
    {"decay": "stable"},
    {"decay": "stable", "stable_cap": 1e-4},
    {"decay": "coupled"},
    {"decay": "cpr", "cpr_init": "warm_start", "cpr_steps": 3, "cpr_reg": "l1"},
    {"decay": "cpr", "cpr_steps": 3, "cpr_rate": 0.1},  # l2 of R ~ 1 at rate 1 amplifies rounding by 2 a step
    {"decay": "cpr", "cpr_init": "dependent", "cpr_kappa": 0.9, "cpr_reg": "huber"},
    {"decay": "cpr", "cpr_init": "uniform", "cpr_kappa": 0.8, "cpr_reg": "std"},
    {"decay": "cpr", "cpr_init": "uniform", "cpr_kappa": 0.2, "cpr_cap": 0.1},
    {"lookahead": True},
    {"lookahead": True, "lookahead_k": 3, "lookahead_alpha": 0.8},
]

# All stages at once; between them, every value of the flags that can take only one.
TOGETHER = [
    {
        "centralize": True,
        "agc": True,
        "agc_clip": 0.3,
        "denominator": "atan2",
        "cautious": True,
        "trust_ratio": True,
        "decay": "cautious",
        "lookahead": True,
    },
    {
        "soft_clip": True,
        "soft_clip_scale": 0.5,
        "denominator": "softplus",
        "softplus_bias": "outside",
        "trust_ratio": True,
        "trust_vectors": True,
        "trust_clip": 1.2,
        "decay": "stable",
        "lookahead": True,
    },
    {
        "centralize": True,
        "normalize": True,
        "normalize_scale": "rms",
        "cautious": True,
        "trust_ratio": True,
        "trust_on": "gradient",
        "decay": "coupled",
        "lookahead": True,
        "lookahead_k": 3,
    },
    {
        "agc": True,
        "centralize": True,
        "centralize_on": "update",
        "trust_ratio": True,
        "decay": "cpr",
        "cpr_init": "warm_start",
        "cpr_steps": 3,
        "cpr_rate": 0.1,
        "lookahead": True,
    },
]
