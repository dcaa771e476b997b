# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Decoupled weight decay."""

from ..core import Flag


class Decoupled(Flag):
    """Shrink the weights by lr * weight_decay, apart from the gradient.

        p <- p - lr weight_decay p

    with the step size that the update really uses. https://huggingface.co/papers/1711.05101
    """

    flag, value, stage = "decay", "decoupled", "decay"

    @staticmethod
    def apply(p, c):
        return c.h.weight_decay * p
