# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Lookahead around AdamW, arXiv 1907.08610: AdamW, and what flags.py says about its flag."""

from . import adamw
from .adamw import Oracle


__all__ = ["CASES", "Oracle"]

CASES = [*adamw.CASES, {"lookahead_k": 3}, {"lookahead_alpha": 0.8}]
