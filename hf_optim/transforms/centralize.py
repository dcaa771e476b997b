# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient centralisation."""

import torch

from ..core import Flag, averaged, hp


class Centralize(Flag):
    """Subtract from the gradient of each output unit its mean.

        g_i <- g_i - mean(g_i)      over all axes but the first, for tensors of two or more dimensions

    A unit with a single weight keeps its gradient (its mean is the gradient itself), and so do embeddings, whose rows
    are tokens. The paper and the default centre the gradient; under an adaptive denominator the rows of the update are
    then no longer centred, and `centralize_on=update` (the authors' later advice for Adam) centres the update instead.
    https://huggingface.co/papers/2004.01461
    """

    flag, stage, elementwise = "centralize", "gradient", False
    centralize_on: str = hp("gradient", "what is centred; the paper's is the gradient", choices=("gradient", "update"))

    @classmethod
    def acts_at(cls, h):
        return h.centralize_on

    @staticmethod
    def apply(x, c):
        if x.ndim < 2 or x.numel() == x.shape[0]:
            return x
        return x - averaged(x, range(1, x.ndim), keepdim=True)

    @staticmethod
    def options_for(at, h):
        return {"centralize": False} if isinstance(at.module, torch.nn.Embedding) else {}
