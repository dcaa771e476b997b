# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient centralisation."""

from ..core import Flag


class Centralize(Flag):
    """Subtract from the gradient of each output unit its mean.

        g_i <- g_i - mean(g_i)      over all axes but the first, for tensors of two or more dimensions

    A unit with a single weight keeps its gradient (its mean is the gradient itself). Under an adaptive denominator
    the rows of the update are no longer centred. https://huggingface.co/papers/2004.01461
    """

    flag, stage, elementwise = "centralize", "gradient", False

    @staticmethod
    def apply(g, c):
        if g.ndim < 2 or g.numel() == g.shape[0]:
            return g
        return g - g.mean(tuple(range(1, g.ndim)), keepdim=True)
