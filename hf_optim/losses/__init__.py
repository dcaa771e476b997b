# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Losses for `Trainer(compute_loss_func=...)` that treat the samples of a batch unequally."""

from __future__ import annotations

from typing import Any

import torch

from ..core.options import nearest
from ..optim_args import split_optim_args
from ..trainer.compute_loss import Loss
from .gradtail import GradTail
from .soft_median import SoftMedian, soft_median, survey_soft_median


__all__ = [
    "LOSSES",
    "GradTail",
    "Loss",
    "SoftMedian",
    "create_loss",
    "soft_median",
    "split_loss_args",
    "survey_soft_median",
]

LOSSES: dict[str, type[Loss]] = {cls.name: cls for cls in (SoftMedian, GradTail)}


def create_loss(name: str, model: torch.nn.Module, **options: Any) -> Any:
    """Make a loss by its name: `Trainer(..., compute_loss_func=loss, callbacks=[loss])`.

    Args:
        name (`str`): one of `LOSSES`.
        model ([`~transformers.PreTrainedModel`]): the model to train.
        options: of the loss; values may be strings, as they come from a command line.

    Raises:
        `TypeError`: for an unknown option.
        `ValueError`: for an unknown name, or a value out of range.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}{nearest(name, LOSSES)} (losses: {', '.join(LOSSES)})")
    return LOSSES[name](model, **options)


def split_loss_args(text: str | None) -> dict[str, Any]:
    """Split the value of `--loss_args`, written as that of `--optim_args`, into names and values.

    Raises:
        `ValueError`: if it is not `name=value,name=value` or a JSON object, or gives a name twice.
    """
    try:
        return split_optim_args(text)
    except ValueError as error:
        raise ValueError(str(error).replace("`optim_args`", "`loss_args`")) from None
