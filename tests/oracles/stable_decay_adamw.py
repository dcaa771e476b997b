# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamS, arXiv 2011.11152: AdamW, and what flags.py says about its flag."""

from . import adamw
from .adamw import Oracle


__all__ = ["CASES", "Oracle"]

CASES = [*adamw.CASES, {"stable_cap": 0.0001}]
