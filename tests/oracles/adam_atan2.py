# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Adam-atan2, arXiv 2407.05872: AdamW, and what flags.py says about its flag."""

from . import adamw
from .adamw import Oracle


__all__ = ["CASES", "Oracle"]

CASES = [*adamw.CASES, {"atan2_a": 2.0}, {"atan2_b": 3.0}]
