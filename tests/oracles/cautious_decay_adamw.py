# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamW with cautious decay, arXiv 2510.12402: AdamW, and what flags.py says about its flag."""

from .adamw import CASES, Oracle


__all__ = ["CASES", "Oracle"]
