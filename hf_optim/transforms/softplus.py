# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Softplus instead of eps."""

import torch

from ..core import Flag, hp


class Softplus(Flag):
    """Divide by softplus(denominator): a smooth floor of ln 2 / softplus_beta.

        u = m_hat / softplus(sqrt(v_hat))                       inside: bias correction first, as in Ranger21
        u = c m / softplus(sqrt(v)),  c = sqrt(1 - beta2^t) / (1 - beta1^t)      outside: the authors' code

    with softplus(z) = ln(1 + exp(softplus_beta z)) / softplus_beta. The knee, about 2.5 / softplus_beta, is absolute:
    gradients far below it (most of a transformer's) see a constant denominator, so the method is momentum with a
    larger lr, and it depends on the scale of the loss. Which correction the paper means is unverified.
    https://huggingface.co/papers/1908.00700
    """

    flag, value, stage = "denominator", "softplus", "ratio"
    softplus_beta: float = hp(50.0, "sharpness: the inverse of the scale where the floor sets in", gt=0)
    softplus_bias: str = hp("inside", "where the bias of the average is corrected", choices=("inside", "outside"))

    @staticmethod
    def apply(num, den, h):
        correction = 1.0 if h.softplus_bias == "inside" else h.debias2
        smooth = torch.nn.functional.softplus(den / correction, beta=h.softplus_beta, threshold=40.0)
        return num / (smooth * correction)
