# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdaNorm: gradients below their usual norm are scaled up before they enter the momentum."""

from ..core import hp, keep
from .adamw import AdamW


class AdaNorm(AdamW):
    """AdamW whose momentum sees gradients of at least the average norm.

        n = ||g||,  e <- gamma e + (1 - gamma) n              one number per tensor
        s = min(e / n, largest) g                             where 0 < n < e, else g
        m <- beta1 m + (1 - beta1) s,  v <- beta2 v + (1 - beta2) g^2, and on as in AdamW

    `largest` is not in the paper: there an entry whose neighbour has just gone silent moves by thousands of lr. A zero
    gradient stays zero (0 / 0 in the authors' code, which also adds eps to v at every step). Embedding rows share the
    norm of their tensor. https://huggingface.co/papers/2210.06364
    """

    gamma: float = hp(0.95, "decay of the average norm", ge=0, lt=1)
    largest: float = hp(10.0, "largest factor on a gradient", ge=1)

    elementwise = False
    needs_matrix = True

    @staticmethod
    def init(p, h):
        return AdamW.init(p, h) | {"e": keep(p)}

    @staticmethod
    def update(g, p, s, h):
        norm = g.square().sum().sqrt()
        s.e = s.e.lerp(norm, 1 - h.gamma)
        factor = (s.e / norm.where(norm > 0, 1.0)).clamp(1.0, h.largest)
        s.m = s.m.lerp(factor * g, 1 - h.beta1)
        return h.ratio(s.m * h.debias1, AdamW.root(g, s, h))
