# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Stable weight decay."""

import math

from ..core import Flag, Optimizer, hp


class StableDecay(Flag):
    """Decay at the rate at which the optimizer moves the weights.

        p <- p - lr weight_decay p / sqrt(mean(v_hat))       rules with a second moment (AdamS)
        p <- p - lr weight_decay p gain                      momentum: gain = (1 - dampening) / (1 - momentum) (SGDS)

    The mean is over all weights of the model, so all gradients of a step must be there at once. The decay grows as
    gradients shrink: for the decay of AdamW multiply its `weight_decay` by the root mean square of the gradients.
    `stable_cap` bounds what a step takes off; without it (the authors' code) gradients of 1e-7 turn the weights over.
    Zero gradients decay nothing. An eps in the root is unverified. https://huggingface.co/papers/2011.11152
    """

    flag, value, stage, multiplies = "decay", "stable", "decay", "weight_decay"
    stable_cap: float = hp(0.1, "largest share of a weight that one step takes off", gt=0, le=1)

    @classmethod
    def excludes(cls, rule):
        lost = (rule.second_moment, rule.gain) == (Optimizer.second_moment, Optimizer.gain)
        return super().excludes(rule) or ("it has neither a second moment nor plain momentum" if lost else "")

    @staticmethod
    def sums(rule, h):
        return () if rule.second_moment is Optimizer.second_moment else ("stable_total", "stable_count")

    @staticmethod
    def measure(c):
        c.rule.update(c.g, c.p, c.s, c.h)
        v = c.rule.second_moment(c.s, c.h)
        return {"stable_total": v.sum() * (c.p.numel() / v.numel()), "stable_count": c.p.numel()}

    @staticmethod
    def apply(p, c):
        gain = c.rule.gain(c.h)
        if gain is None:
            mean = c.h.stable_total / c.h.stable_count
            gain = mean.where(mean > 0, math.inf).rsqrt()
        share = c.lr * c.h.weight_decay * gain * p.new_ones(())
        return c.h.weight_decay * gain * (c.h.stable_cap / share.clamp(min=c.h.stable_cap)) * p
