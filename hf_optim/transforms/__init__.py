# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Flags, one file per technique. Importing a file registers it; the order here is the order within a stage."""

# isort: off
from .centralize import Centralize
from .agc import AGC
from .soft_clip import SoftClip
from .normalize import Normalize
from .eps import Eps
from .atan2 import Atan2
from .softplus import Softplus
from .cautious import Cautious
from .trust_ratio import TrustRatio
from .decoupled import Decoupled
from .cautious_decay import CautiousDecay
from .stable_decay import StableDecay
from .cpr import CPR
from .coupled import Coupled
from .lookahead import Lookahead
# isort: on


__all__ = [
    "AGC",
    "Atan2",
    "CPR",
    "Cautious",
    "CautiousDecay",
    "Centralize",
    "Coupled",
    "Decoupled",
    "Eps",
    "Lookahead",
    "Normalize",
    "SoftClip",
    "Softplus",
    "StableDecay",
    "TrustRatio",
]
