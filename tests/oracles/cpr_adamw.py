# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamCPR, arXiv 2311.09058: AdamW, and what flags.py says about its flag."""

from . import adamw
from .adamw import Oracle


__all__ = ["CASES", "Oracle"]

CASES = [*adamw.CASES, {"cpr_steps": 5}, {"cpr_rate": 0.3}, {"cpr_init": "warm_start", "cpr_reg": "l1"}]
BASE = {"cpr_steps": 3, "cpr_rate": 0.1}  # with the default of 200 the bounds come after 600 steps
