# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient normalisation."""

from ..core import Flag, averaged, hp


class Normalize(Flag):
    """Divide the gradient of each tensor by its norm.

        g <- g / ||g||                  0 stays 0
        g <- sqrt(n) g / ||g||          normalize_scale=rms: the root mean square of the n entries is 1

    The norm makes entries of small tensors move sqrt(n) times faster; under Adam, which a constant factor does not
    touch, only the change of the norm from step to step is removed. From a survey without a paper of its own; compare
    `nsgda`, https://huggingface.co/papers/2210.04319.
    """

    flag, stage, elementwise = "normalize", "gradient", False
    sets = "the size of the gradient"
    normalize_scale: str = hp("norm", "what becomes 1: norm or root mean square", choices=("norm", "rms"))

    @staticmethod
    def apply(g, c):
        square = g.square()
        size = (averaged(square) if c.h.normalize_scale == "rms" else square.sum()).sqrt()
        return g / size.where(size > 0, 1.0)
