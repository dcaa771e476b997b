# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SGD with adaptive memory."""

import math

from ..core import Optimizer, hp, like


class AMSGD(Optimizer):
    """Momentum whose coefficient is found at every step: how much the old direction is worth beside the gradient.

        mu = ||g||^2 / ||g - d||^2                            of the whole model, or of each tensor with scope=tensor
        mu <- clip(mu, pull / (1 + pull), (cap + pull) / (1 + pull))
        d <- mu d + (1 - mu) g                                the first d is g
        p <- p - lr weight_decay p - lr d

    This is the minimiser of the larger of two planes, the gradient's and the memory's, plus |s|^2 / (2 lr) and
    pull |s + lr d|^2 / (2 lr); mu is its dual variable, and the form above follows from it. Where noise or agreement
    rules, mu sits at its cap (0.9) and this is momentum SGD; a gradient against the memory gives 1/4.
    https://huggingface.co/papers/2510.04988. The text of the paper was not available: the constants are those of an
    independent implementation, and its scope for SGD is unverified.
    """

    lr: float = hp(0.1, "step size", ge=0)
    pull: float = hp(0.1, "pull towards the previous direction", ge=0)
    cap: float = hp(0.89, "largest weight of the memory plane", ge=0, lt=1)
    scope: str = hp("model", "what shares one coefficient", choices=("model", "tensor"))

    needs_matrix = True  # of a flat shard of several tensors the coefficient is another one

    @staticmethod
    def init(p, h):
        return {"d": like(p)}

    @staticmethod
    def scalars(t, h):
        return {"first": float(t == 1)}

    @staticmethod
    def sums(h):
        return ("squares", "gap") if h.scope == "model" else ()

    @staticmethod
    def measure(g, p, s, h):
        d = s.d.lerp(g, h.first)
        return {"squares": g.square().sum(), "gap": (g - d).square().sum()}

    @staticmethod
    def update(g, p, s, h):
        found = {"squares": h.squares, "gap": h.gap} if h.scope == "model" else AMSGD.measure(g, p, s, h)
        squares, gap = found["squares"], found["gap"]
        mu = (squares / gap.where(gap > 0, math.inf)).clamp(h.pull / (1 + h.pull), (h.cap + h.pull) / (1 + h.pull))
        s.d = g.lerp(s.d.lerp(g, h.first), mu)
        return s.d
