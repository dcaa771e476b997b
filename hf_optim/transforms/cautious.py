# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Cautious updates."""

import torch

from ..core import Flag, back, hp, xorsign


class Cautious(Flag):
    """Drop the components of the update that disagree with the gradient in sign, and rescale the rest.

        mask = [sign(u) = sign(g) != 0]
        u <- u mask / max(mean(mask), floor)

    The mean is over the components where g is not 0: counting the others as misaligned multiplies the step of the few
    touched rows of an embedding by up to 1/floor (the reference code does). Where u is 0 and g is not, the sign that
    the zero carries counts. Moments are not masked; weight decay acts before and unmasked.
    https://huggingface.co/papers/2411.16085
    """

    flag, stage, elementwise, reads_gradient = "cautious", "update", False, True
    cautious_floor: float = hp(1e-3, "smallest share of agreeing components to divide by", gt=0, le=1)

    @staticmethod
    def apply(u, c):
        mask = xorsign(c.g, c.signs if u is c.u else u) > 0
        aligned, live = (back(x.sum(dtype=torch.int32), u) for x in (mask, c.g != 0))
        share = aligned / live.clamp(min=1.0)
        return u * (back(mask, u) * (1 / share.clamp(min=c.h.cautious_floor)))
