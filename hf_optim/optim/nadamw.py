# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""NAdamW: Adam with Nesterov momentum and a momentum schedule."""

from functools import cache

from ..core import hp
from .adamw import AdamW


class NAdamW(AdamW):
    """AdamW that looks one step of momentum ahead.

        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)
        m_hat = (1 - mu_t) g / (1 - mu_1 ... mu_t) + mu_{t+1} m / (1 - mu_1 ... mu_{t+1})
        p <- p - lr weight_decay p - lr m_hat / (sqrt(v_hat) + eps)

    with m and v_hat of AdamW. mu starts at beta1 / 2 and takes thousands of steps to reach beta1, a momentum warm-up.
    Equals `torch.optim.NAdam(decoupled_weight_decay=True)`, which averages m with beta1 where Dozat's text has mu_t
    (https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ). Decay: https://huggingface.co/papers/1711.05101
    """

    lr: float = hp(2e-3, "step size", ge=0)
    momentum_decay: float = hp(4e-3, "how fast the momentum schedule rises to beta1", ge=0)

    @staticmethod
    def scalars(t, h):
        now, after = product(t, h.beta1, h.momentum_decay), product(t + 1, h.beta1, h.momentum_decay)
        fresh = (1 - schedule(t, h.beta1, h.momentum_decay)) / (1 - now)
        ahead = schedule(t + 1, h.beta1, h.momentum_decay) / (1 - after)
        return AdamW.scalars(t, h) | {"fresh": fresh, "ahead": ahead}

    @staticmethod
    def update(g, p, s, h):
        s.m = s.m.lerp(g, 1 - h.beta1)
        return h.ratio(h.fresh * g + h.ahead * s.m, AdamW.root(g, s, h))


def schedule(t, beta1, decay):
    """mu_t."""
    return beta1 * (1 - 0.5 * 0.96 ** (t * decay))


@cache
def products(beta1, decay):
    """mu_1, mu_1 mu_2, ...: a list that grows as steps are taken."""
    return [1.0]


def product(t, beta1, decay):
    """mu_1 ... mu_t; below 1e-20 it no longer matters beside 1, and stays."""
    known = products(beta1, decay)
    while len(known) <= t and known[-1] > 1e-20:
        known.append(known[-1] * schedule(len(known), beta1, decay))
    return known[min(t, len(known) - 1)]
