# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Amos: weight decay and step size that fall together, scaled to the model."""

import torch

from ..core import Optimizer, along, averaged, by_pattern, hp, keep, like


class Amos(Optimizer):
    """Steps of the size that each tensor should have; decay that adapts to them.

        q = mean(g^2) over the input axes;  v <- beta v + (1 - beta) q;  rho = (1 - beta^t) / max(v, 2^-125)
        c = (1 + c_coef sqrt(lr) b)^(-1/2);  d = 1 / (1 + d_coef sqrt(lr eta) b)
        gamma = c lr^2 rho q;  b <- b + gamma (1 + b)     c and d are of the old b
        u = d (eta sqrt(rho) g + (gamma / (2 lr) + weight_decay) p)
        m <- momentum m + (1 - momentum) u;  u <- m       only if momentum > 0
        p <- p - lr u

    eta is the size that the entries of a tensor should have: 1 for norm weights, 0.5 for other vectors, sqrt(2 / dim)
    for embeddings, else 1 / sqrt(fan_in); `etas` sets it by name. lr: near 1 / sqrt(batches), 0.01 to 0.1 in short
    runs. Clip gradients: a spike raises gamma by up to 1 / (1 - beta), and b for good.
    https://huggingface.co/papers/2210.11693. Deviations: the paper's extra L2 is lr weight_decay, as everywhere in
    torch; m averages directions without lr in them, so that a schedule is followed at once.
    """

    lr: float = hp(0.03, "step size relative to eta; 5e-5 does nothing", ge=0)
    beta: float = hp(0.999, "decay of the average squared gradient", ge=0, lt=1)
    c_coef: float = hp(0.25, "how fast decay falls", ge=0)
    d_coef: float = hp(0.25, "how fast steps fall", ge=0)
    momentum: float = hp(0.0, "decay of the average update; 0 keeps no buffer", ge=0, lt=1)
    clip: float | None = hp(None, "largest absolute gradient entry", gt=0)
    eta: float | None = hp(None, "size of the entries of a tensor; none derives it from the shape", gt=0)
    etas: str = hp("", "`pattern:eta;pattern:eta`, found in parameter names, first match wins", patterns=True)
    output_axis: int = hp(0, "axis of the output units: 1 for transformers' Conv1D", ge=0, le=1)

    needs_matrix = applies_decay = True
    by_name = ("etas",)

    @staticmethod
    def init(p, h):
        stat = keep(p, h.output_axis) if p.ndim > 1 else keep(p)
        return {"v": stat, "b": stat} | ({"m": like(p)} if h.momentum else {})

    @staticmethod
    def scalars(t, h):
        return {"debias": 1 - h.beta**t, "root": h.lr**0.5}

    @staticmethod
    def update(g, p, s, h):
        g = g if h.clip is None else g.clamp(-h.clip, h.clip)
        matrix, axis = g.ndim > 1, h.output_axis
        q = averaged(g.square(), [a for a in range(g.ndim) if not matrix or a != axis])
        s.v = s.v.lerp(q, 1 - h.beta)
        rho = h.debias / s.v.clamp(min=2.0**-125)
        eta = h.eta or (p.shape[axis] / max(p.numel(), 1) if matrix else 0.25) ** 0.5
        c = (1 + h.c_coef * h.root * s.b).rsqrt()
        d = 1 / (1 + h.d_coef * h.root * eta**0.5 * s.b)
        pull = c * h.lr * rho * q  # gamma / lr
        s.b = s.b + h.lr * pull * (1 + s.b)
        push, pull = d * eta * rho.sqrt(), d * (pull / 2 + h.weight_decay)
        u = along(push, axis, g.ndim) * g + along(pull, axis, g.ndim) * p
        if h.momentum:
            u = s.m = s.m.lerp(u, 1 - h.momentum)
        return u

    @staticmethod
    def options_for(at, h):
        eta, kind = by_pattern(h.etas, at.name, h.eta), type(at.module).__name__
        if eta is None and isinstance(at.module, torch.nn.Embedding):
            eta = (2 / at.module.embedding_dim) ** 0.5
        elif eta is None and at.p.ndim < 2 and "norm" in kind.lower() and at.name.endswith("weight"):
            eta = 1.0
        axis = {"output_axis": 1} if kind == "Conv1D" and at.p.ndim > 1 else {}
        return axis if eta is None else axis | {"eta": eta}

    @staticmethod
    def refuses(h):
        idle = {} if h.momentum else {"cautious": "without momentum only the decay could disagree with the gradient"}
        return idle | {"etas": "it needs the names of the parameters: build the optimizer from the model"}
