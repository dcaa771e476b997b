# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Adafactor: second moments kept as one row and one column average."""

from ..convert import from_transformers_adafactor
from ..core import Optimizer, averaged, factored_rsqrt, hp, like, rms, two_largest, without


class Adafactor(Optimizer):
    """Adam without momentum and with sublinear memory.

        w = t^-decay_rate
        R <- (1 - w) R + w mean_cols(g^2 + eps1)          C <- (1 - w) C + w mean_rows(g^2 + eps1)
        u = g / sqrt(R C^T / mean(R))                     vectors: V <- (1 - w) V + w (g^2 + eps1),  u = g / sqrt(V)
        u <- u / max(1, rms(u) / clip_threshold)
        m <- beta1 m + (1 - beta1) u;  u <- m             only with beta1
        alpha = lr                                        relative_step: min(1e-2, 1 / sqrt(t))
        alpha <- alpha max(eps2, rms(p))                  only with scale_parameter
        p <- p - alpha weight_decay p - alpha u

    https://huggingface.co/papers/1804.04235. Corrected against transformers' `Adafactor`: the inverse root is formed
    from float64 vectors, rounded once (finite where a dead row meets a large mean); closures run with gradients;
    statistics stay fp32 for bf16 weights, also in checkpoints; momentum averages the clipped update without the step
    size, so a schedule is followed at once; it runs on DTensors. More than two dimensions are factored along the two
    longest (experts: the last two; convolutions: channels), not always the last two. The defaults are Trainer's;
    `relative_step=true,scale_parameter=true` is the paper. With `relative_step` the scheduler acts through
    lr / initial lr (of which reduce_lr_on_plateau knows nothing), and `warmup_init` replaces 1e-2 by 1e-6 t.
    """

    lr: float = hp(1e-3, "step size; with relative_step only its schedule counts", ge=0)
    relative_step: bool = hp(False, "derive the step size from the step count")
    scale_parameter: bool = hp(False, "multiply the step size by the root mean square of the weights")
    warmup_init: bool = hp(False, "start relative_step from 1e-6 t")
    clip_threshold: float = hp(1.0, "largest root mean square of an update", gt=0)
    decay_rate: float = hp(0.8, "exponent of the second-moment schedule", gt=0, le=1)
    beta1: float | None = hp(None, "decay of the average update; none keeps no average", ge=0, lt=1)
    eps1: float = hp(1e-30, "added to squared gradients", gt=0)
    eps2: float = hp(1e-3, "smallest root mean square of the weights", gt=0)

    needs_matrix = True
    returns_lr = True

    @staticmethod
    def init(p, h):
        if p.ndim < 2:
            slots = {"v": like(p, narrow=False)}
        else:
            a, b = two_largest(p.shape)
            slots = {"row": without(p, b), "col": without(p, a)}
        return slots | ({"m": like(p)} if h.beta1 is not None else {})

    @staticmethod
    def scalars(t, h):
        relative = min(1e-6 * t if h.warmup_init else 1e-2, t**-0.5) * h.schedule
        return {"fresh": t**-h.decay_rate, "alpha": relative if h.relative_step else h.lr}

    @staticmethod
    def update(g, p, s, h):
        g2 = g.square() + h.eps1
        if g.ndim < 2:
            s.v = s.v.lerp(g2, h.fresh)
            u = g * s.v.rsqrt()
        else:
            a, b = two_largest(g.shape)
            s.row = s.row.lerp(averaged(g2, [b]), h.fresh)
            s.col = s.col.lerp(averaged(g2, [a]), h.fresh)
            row, col = factored_rsqrt(s.row, s.col, a, b)
            u = g * row.unsqueeze(b) * col.unsqueeze(a)
        u = u / (rms(u) / h.clip_threshold).clamp(min=1.0)
        if h.beta1 is not None:
            u = s.m = s.m.lerp(u, 1 - h.beta1)
        return u, rms(p).clamp(min=h.eps2) * h.alpha if h.scale_parameter else h.alpha

    @staticmethod
    def refuses(h):
        needs = {"cautious": "beta1", "warmup_init": "relative_step", "eps2": "scale_parameter"}
        return {name: f"it needs `{other}`" for name, other in needs.items() if not getattr(h, other)}

    second_moment = staticmethod(lambda s, h: s.row if hasattr(s, "row") else s.v)  # the same mean
    convert_state_dict = staticmethod(from_transformers_adafactor)
