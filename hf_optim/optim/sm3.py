# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SM3: AdaGrad whose accumulators are kept per row and per column."""

import torch

from ..core import Optimizer, along, amax, hp, keep, like


class SM3(Optimizer):
    """Cover the accumulated squared gradients by one vector per axis.

        nu = min over axes a of A_a[i_a] + g^2            beta > 0: beta min(...) + (1 - beta) g^2
        u = g / sqrt(nu)                                  0 where nu = 0
        A_a[j] <- max of nu over the slice j of axis a
        m <- momentum m + (1 - momentum) u;  u <- m       only if momentum > 0
        p <- p - lr weight_decay p - lr u

    This is SM3-II. Vectors keep one accumulator per entry (AdaGrad). https://huggingface.co/papers/1901.11150

    Deviations: with `beta` the accumulators are replaced, as the authors describe it (two PyTorch ports keep the
    larger of old and new, so one spike freezes a slice for ever); entries whose accumulator is 0 do not move (an
    added 1e-30 is 0 in fp16); no momentum buffer exists unless asked for; decoupled weight decay is ours. The
    authors warm up over 5 % of the steps and do not decay the learning rate.
    """

    lr: float = hp(0.1, "step size", ge=0)
    momentum: float = hp(0.0, "decay of the average update; 0 keeps no buffer", ge=0, lt=1)
    beta: float = hp(0.0, "decay of the accumulators; 0 accumulates for ever", ge=0, lt=1)

    needs_matrix = True

    @staticmethod
    def init(p, h):
        accumulators = {f"A{a}": keep(p, a) for a in range(p.ndim)} or {"A0": keep(p)}
        return accumulators | ({"m": like(p)} if h.momentum else {})

    @staticmethod
    def update(g, p, s, h):
        axes = range(max(g.ndim, 1))
        nu = s.A0 if g.ndim < 2 else None
        for a in axes if g.ndim > 1 else ():
            cover = along(getattr(s, f"A{a}"), a, g.ndim)
            nu = cover if nu is None else torch.minimum(nu, cover)
        nu = h.beta * nu + (1 - h.beta) * g.square() if h.beta else nu + g.square()
        for a in axes:
            setattr(s, f"A{a}", amax(nu, a) if g.ndim > 1 else nu)
        u = torch.where(nu == 0, 0.0, g / nu.sqrt())  # a GPU takes the `rsqrt` of a subnormal for that of 0
        if h.momentum:
            s.m = s.m.lerp(u, 1 - h.momentum)
            u = s.m
        return u

    @staticmethod
    def refuses(h):
        return {} if h.momentum else {"cautious": "without momentum the update always agrees with the gradient"}
