# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamW: Adam with decoupled weight decay."""

import torch

from ..core import Optimizer, hp, like


class AdamW(Optimizer):
    """Step by the average gradient over the root of the average squared gradient.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2                        amsgrad: v_max <- max(v_max, v), used in place of v below
        p <- p - lr weight_decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Equals `torch.optim.AdamW`; the paper multiplies the decay by the schedule alone, torch and this by all of `lr`.
    `weight_decay` defaults to 0, as in `TrainingArguments`. https://huggingface.co/papers/1711.05101
    """

    beta1: float = hp(0.9, "decay of the average gradient", ge=0, lt=1)
    beta2: float = hp(0.999, "decay of the average squared gradient", ge=0, lt=1)
    amsgrad: bool = hp(False, "divide by the largest average squared gradient so far")

    elementwise = True
    uses_ratio = True

    @staticmethod
    def init(p, h):
        return {"m": like(p), "v": like(p, positive=True)} | ({"v_max": like(p, narrow=False)} if h.amsgrad else {})

    @staticmethod
    def scalars(t, h):
        return {"debias1": 1 / (1 - h.beta1**t), "debias2": (1 - h.beta2**t) ** -0.5}

    @staticmethod
    def update(g, p, s, h):
        s.m = s.m.lerp(g, 1 - h.beta1)
        return h.ratio(s.m * h.debias1, AdamW.root(g, s, h))

    @staticmethod
    def root(g, s, h):
        """The root of the corrected average of g^2, which it advances."""
        s.v = s.v.lerp(g.square(), 1 - h.beta2)
        if h.amsgrad:
            s.v_max = torch.maximum(s.v_max, s.v)
        return (s.v_max if h.amsgrad else s.v).sqrt() * h.debias2

    @staticmethod
    def second_moment(s, h):
        return (s.v_max if h.amsgrad else s.v) * h.debias2**2

    @staticmethod
    def refuses(h):
        return {} if h.beta1 else {"cautious": "without beta1 the update always agrees with the gradient"}
