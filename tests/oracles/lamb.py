# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""LAMB, arXiv 1904.00962: AdamW, and what flags.py says about its flag."""

from . import adamw
from .adamw import Oracle


__all__ = ["CASES", "Oracle"]

CASES = [*adamw.CASES, {"trust_floor": 2.0, "trust_clip": 1.5}, {"trust_vectors": True}]
