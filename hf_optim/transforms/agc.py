# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Adaptive gradient clipping."""

from ..core import Flag, at_most, hp


class AGC(Flag):
    """Clip the gradient of each output unit at a share of the norm of its weights.

        W_i = max(||p_i||, agc_eps),  G_i = ||g_i||
        g_i <- g_i agc_clip W_i / G_i      where G_i > agc_clip W_i

    A unit is a slice along the first axis; a vector is one unit. The output layer (and an embedding tied to it) is
    not clipped, as in the paper, if the optimizer is built from the model. It depends on the scale of the loss. The
    paper wants a larger `agc_clip` for smaller batches. https://huggingface.co/papers/2102.06171
    """

    flag, stage, elementwise = "agc", "gradient", False
    sets = "the size of the gradient"
    agc_clip: float = hp(0.01, "largest norm of a unit's gradient over that of its weights", gt=0)
    agc_eps: float = hp(1e-3, "smallest norm of a unit's weights", gt=0)

    @staticmethod
    def apply(g, c):
        return at_most(g, unit_norm(g), c.h.agc_clip * unit_norm(c.p).clamp(min=c.h.agc_eps))

    @staticmethod
    def options_for(at, h):
        return {"agc": False} if at.is_output else {}


def unit_norm(x):
    """Norm of each slice along the first axis, shaped to be combined with `x`; of a vector or scalar as a whole."""
    return x.square().sum(tuple(range(x.ndim > 1, x.ndim)), keepdim=True).sqrt()
