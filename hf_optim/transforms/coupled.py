# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Coupled weight decay."""

from ..core import Flag


class Coupled(Flag):
    """Add the decay to the gradient (L2 regularisation), where moments and ratio see it.

        g <- g + weight_decay p

    after the other changes of the gradient. Under an adaptive denominator weights with large gradients then decay
    less, which is what AdamW corrects. https://huggingface.co/papers/1711.05101
    """

    flag, value, stage, multiplies = "decay", "coupled", "gradient", "weight_decay"

    @staticmethod
    def apply(g, c):
        return g + c.h.weight_decay * c.p
