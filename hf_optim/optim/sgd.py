# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SGD with momentum."""

from ..core import Optimizer, hp, like


class SGD(Optimizer):
    """Step along the sum of past gradients, each weaker by a factor than the next.

        m <- momentum m + (1 - dampening) g                   the first m is g
        p <- p - lr weight_decay p - lr m

    `torch.optim.SGD` with decoupled decay: a constant gradient ends up multiplied by (1 - dampening) / (1 - momentum).
    Stable decay (SGDS) is made for it. https://huggingface.co/papers/2011.11152
    """

    lr: float = hp(0.1, "step size", ge=0)
    momentum: float = hp(0.9, "decay of the sum of gradients; 0 keeps no buffer", ge=0, lt=1)
    dampening: float = hp(0.0, "share of a new gradient that is left out", ge=0, lt=1)

    elementwise = True

    @staticmethod
    def init(p, h):
        return {"m": like(p)} if h.momentum else {}

    @staticmethod
    def scalars(t, h):
        return {"fresh": 1 - h.dampening if t > 1 else 1.0}

    @staticmethod
    def update(g, p, s, h):
        if not h.momentum:
            return g
        s.m = h.momentum * s.m + h.fresh * g
        return s.m

    @staticmethod
    def averages(h):
        return {"m": (h.momentum, h.fresh)}

    @staticmethod
    def gain(h):
        return (1 - h.dampening) / (1 - h.momentum)

    @staticmethod
    def refuses(h):
        needs = {"cautious": "without momentum the update is the gradient", "dampening": "it needs `momentum`"}
        return {} if h.momentum else needs
