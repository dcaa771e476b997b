# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Flags, one file per technique. Importing a file registers it; the order here is the order within a stage."""

from .centralize import Centralize
from .eps import Eps


from .atan2 import Atan2  # isort: skip
from .cautious import Cautious
from .decoupled import Decoupled


from .cautious_decay import CautiousDecay  # isort: skip
from .lookahead import Lookahead


__all__ = ["Atan2", "Cautious", "CautiousDecay", "Centralize", "Decoupled", "Eps", "Lookahead"]
