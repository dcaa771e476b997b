# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Adam-atan2: a ratio without eps."""

from ..core import Flag, hp


class Atan2(Flag):
    """Take a * atan2(numerator, b * denominator): bounded by a pi/2 and indifferent to the scale of the gradient.

    With the default (a, b) = (1.27, 1) a ratio of 1 gives a step of 1, and a small ratio one 1.27 times Adam's; with
    a = b the small ratios match instead. The paper's own choice of a and b is unverified beyond its table.
    https://huggingface.co/papers/2407.05872
    """

    flag, value, stage = "denominator", "atan2", "ratio"
    atan2_a: float = hp(1.27, "factor of the angle", gt=0)
    atan2_b: float = hp(1.0, "factor of the denominator inside the angle", gt=0)

    @staticmethod
    def apply(num, den, h):
        return h.atan2_a * num.atan2(h.atan2_b * den)
