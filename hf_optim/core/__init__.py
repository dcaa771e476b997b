# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The engine. Optimizer and flag files import from here and from nowhere else."""

from .base import Optimizer, Place
from .flags import FLAGS, STAGES, Flag
from .maths import (
    along,
    amax,
    at_most,
    averaged,
    factored_rsqrt,
    pack_signs,
    rms,
    square_shape,
    summed,
    two_largest,
    with_signs,
)
from .options import Option, by_pattern, hp, parse_options
from .precision import back, lower, xorsign
from .sharding import Slot, beside, keep, like, unsharded, without
