# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The ordinary ratio."""

from ..core import Flag, hp


class Eps(Flag):
    """Divide by the denominator plus eps."""

    flag, value, stage = "denominator", "eps", "ratio"
    eps: float = hp(1e-8, "added to the denominator", ge=0)

    @staticmethod
    def apply(num, den, h):
        return num / (den + h.eps)
