# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SMMF: Adam whose two moments are stored as rank-one factors and a bit per sign."""

import torch

from ..convert import from_interleaved_signs
from ..core import Optimizer, Slot, hp, pack_signs, square_shape, summed, with_signs


class SMMF(Optimizer):
    """Factor |m| and v into row and column sums after every step; the sign of m takes one bit.

        m = sign * (r_m c_m^T),  v = r_v c_v^T            both as matrices; 0 at the start
        m <- beta1_t m + (1 - beta1_t) g                  beta1_t = beta1 growth^(t - 1)
        v <- beta2_t v + (1 - beta2_t) g^2                beta2_t = 1 - t^decay_rate
        p <- p - lr weight_decay p - lr m / (sqrt(v) + eps)
        r_m = row sums of |m|,  c_m = column sums / total,  sign = [m > 0];  r_v, c_v likewise

    `growth` below 1 makes the momentum vanish (0.33 of 0.9 is left after 1000 steps); `decay_rate` is -0.5 for CNNs
    and -0.8 for transformers. https://huggingface.co/papers/2412.08894. Deviations: the matrix has the parameter's own
    rows unless `matricize=square` asks for the paper's reshape, which mixes them: as a bit cannot say "zero", rows of
    an embedding that never get a gradient drift as fast as the others move. Signs are bits (there, bytes).
    """

    beta1: float | None = hp(0.9, "first decay of the average gradient; none keeps no average", ge=0, lt=1)
    growth: float = hp(0.999, "factor of beta1 per step", gt=0, le=1)
    decay_rate: float = hp(-0.5, "exponent of the second-moment schedule", ge=-1, le=0)
    matricize: str = hp("rows", "matrix that a tensor is seen as", choices=("rows", "square"))

    needs_matrix = uses_ratio = True
    convert_state_dict = staticmethod(from_interleaved_signs)

    @staticmethod
    def init(p, h):
        (m, n), row = matrix(p.shape, h), 0 if h.matricize == "rows" and p.ndim else None
        slots = {"row_v": Slot((m,), (row,)), "col_v": Slot((n,), (None,))}
        if h.beta1 is not None:
            signs = Slot((m, -(-n // 8)), (row, None), dtype=torch.uint8)
            slots |= {"row_m": slots["row_v"], "col_m": slots["col_v"], "signs": signs}
        return slots

    @staticmethod
    def scalars(t, h):
        return {"new1": 1 - (h.beta1 or 0) * h.growth ** (t - 1), "new2": t**h.decay_rate}

    @staticmethod
    def update(g, p, s, h):
        gm = g.reshape(s.row_v.shape[0], s.col_v.shape[0])
        v = (s.row_v.unsqueeze(1) * s.col_v).lerp(gm.square(), h.new2)
        if h.beta1 is None:
            m, ((s.row_v, s.col_v),) = gm, factors(v)
        else:
            m = with_signs(s.row_m.unsqueeze(1) * s.col_m, s.signs).lerp(gm, h.new1)
            (s.row_v, s.col_v), (s.row_m, s.col_m) = factors(v, m.abs())
            s.signs = pack_signs(m)
        return h.ratio(m, v.sqrt()).reshape(g.shape)

    @staticmethod
    def refuses(h):
        idle = () if h.beta1 else ("cautious", "growth")
        return {"softplus_bias": "no bias is corrected", **dict.fromkeys(idle, "it needs `beta1`")}

    @staticmethod
    def needs_whole(h):
        return "`matricize=square` mixes rows, use `rows` under FSDP2" if h.matricize == "square" else ""


def matrix(shape, h):
    """The (m, n) that a tensor is seen as: its rows, or nearest to a square."""
    if h.matricize == "square":
        return square_shape(shape.numel())
    return (shape[0], shape.numel() // max(shape[0], 1)) if len(shape) else (1, 1)


def factors(*xs):
    """Row sums, and column sums over the total. Short totals share a temporary: small steps are made of those."""
    cols = [summed(x, 0) for x in xs]
    totals = torch.stack(cols).sum(1) if cols[0].shape[0] <= 24 else [col.sum() for col in cols]
    return [(x.sum(1), col / total.where(total > 0, 1.0)) for x, col, total in zip(xs, cols, totals)]
