# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""C-AdamW, arXiv 2411.16085: AdamW, and what flags.py says about its flag."""

from . import adamw
from .adamw import Oracle


__all__ = ["CASES", "Oracle"]

CASES = [case for case in adamw.CASES if case.get("beta1", 1)]  # without beta1 nothing disagrees
CASES += [{"cautious_floor": 0.95}]
BASE = {"beta1": 0.893}  # 0.9 is a ratio of bf16 gradients: the momentum is then 0, its sign rounding
