# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers after Adam for Hugging Face Transformers: `--optim NAME` in any Trainer script.

Importing this package imports torch and never transformers; `register()` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core import Optimizer, hp
from .optim.adafactor import Adafactor
from .optim.adalo import AdaLo
from .optim.adamw import AdamW
from .optim.amos import Amos
from .optim.nsgda import NSGDA
from .optim.sm3 import SM3
from .optim.smmf import SMMF
from .registry import OptimInfo, create, info, list_optimizers


if TYPE_CHECKING:
    from .memory import MemoryEstimate as MemoryEstimate
    from .memory import estimate_memory as estimate_memory
    from .trainer.callbacks import GradientTails as GradientTails
    from .trainer.loss import LossAwareMixin as LossAwareMixin
    from .trainer.loss import LossAwareTrainer as LossAwareTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "NSGDA",
    "SM3",
    "SMMF",
    "AdaLo",
    "Adafactor",
    "AdamW",
    "Amos",
    "OptimInfo",
    "Optimizer",
    "create",
    "hp",
    "info",
    "list_optimizers",
    "register",
]


def register(info: OptimInfo | None = None, *, replace: tuple[str, ...] = ()) -> None:
    """Make every optimizer a choice of `TrainingArguments(optim=...)` and of `--optim`. Idempotent.

    Call it before the argument parser is built, in every process.

    Args:
        info ([`OptimInfo`], *optional*): an optimizer of your own to add first.
        replace (`tuple[str]`, *optional*):
            Built-in names that should resolve to ours: `("adafactor",)`.
    """
    from . import registry
    from .trainer.register import register_names

    if info is not None:
        registry.register(info)
    register_names(replace)


def __getattr__(name: str) -> Any:
    if name in ("LossAwareMixin", "LossAwareTrainer"):
        from .trainer import loss

        return getattr(loss, name)
    if name in ("MemoryEstimate", "estimate_memory"):
        from . import memory

        return getattr(memory, name)
    if name == "GradientTails":
        from .trainer.callbacks import GradientTails

        return GradientTails
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
