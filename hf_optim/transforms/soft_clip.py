# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Clipping at the scale of the weights."""

from ..core import Flag, at_most, averaged, hp


class SoftClip(Flag):
    """Scale the gradient of each output unit down to the root mean square of its weights.

        a_i = max(rms(p_i), soft_clip_floor),  b_i = rms(g_i)
        g_i <- g_i min(b_i, soft_clip_scale a_i) / b_i

    A unit is a slice along the first axis; a vector is one unit. The survey's form has a floor of 1e-12, with which
    weights that start at zero, such as LoRA's B, hardly ever leave it; 1e-3 keeps them alive. Mostly the identity:
    gradients of language models are far smaller than weights. It depends on the scale of the loss. From a survey
    without a paper of its own; compare AGC, https://huggingface.co/papers/2102.06171.
    """

    flag, stage, elementwise = "soft_clip", "gradient", False
    sets = "the size of the gradient"
    soft_clip_scale: float = hp(1.0, "largest root mean square of a unit's gradient over that of its weights", gt=0)
    soft_clip_floor: float = hp(1e-3, "smallest root mean square of a unit's weights", gt=0)

    @staticmethod
    def apply(g, c):
        return at_most(g, unit_rms(g), c.h.soft_clip_scale * unit_rms(c.p).clamp(min=c.h.soft_clip_floor))


def unit_rms(x):
    """Root mean square of each slice along the first axis, shaped to be combined with `x`; of a vector as a whole."""
    return averaged(x.square(), range(x.ndim > 1, x.ndim), keepdim=True).sqrt()
