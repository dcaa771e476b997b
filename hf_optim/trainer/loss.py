# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The loss of a step, brought to optimizers that need it; and a Trainer that skips steps that would do harm."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import Trainer

from ..core import Optimizer
from ..core.sharding import mean_over_ranks


logger = logging.getLogger(__name__)


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def delivering(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.backward` that first hands the loss of the whole accumulation window to the optimizers.

    Before, not after: under DeepSpeed the optimizer steps inside the call.
    """
    if getattr(backward, "_delivers_loss", False):
        return backward

    @functools.wraps(backward)
    def wrapper(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> Any:
        wanting = [o for o in map(innermost, self._optimizers) if getattr(o, "needs_loss", False)]
        if wanting:
            _deliver(self, wanting, loss, kwargs)
        return backward(self, loss, **kwargs)

    wrapper._delivers_loss = True  # type: ignore[attr-defined]
    return wrapper


def _deliver(accelerator: Accelerator, wanting: list[Optimizer], loss: torch.Tensor, kwargs: dict[str, Any]) -> None:
    part = loss.detach().float()
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if not deepspeed or kwargs.get("scale_wrt_gas", True):  # what the original is about to divide by
        part = part / accelerator.gradient_accumulation_steps
    window = getattr(accelerator, "_loss_of_window", 0.0) + part
    if accelerator.sync_gradients:
        for optimizer in wanting:
            optimizer.report_loss(window)
        window = 0.0
    accelerator._loss_of_window = window


def deliver_loss(accelerator: Accelerator) -> None:
    """Make one accelerator deliver the loss to its optimizers; idempotent."""
    accelerator.backward = types.MethodType(delivering(type(accelerator).backward), accelerator)


def add_effective_lr(optimizer: Any, logs: dict[str, Any]) -> None:
    """Put the step size that was really used next to the scheduler's `learning_rate`."""
    inner = innermost(optimizer)
    if "learning_rate" in logs and isinstance(inner, Optimizer):
        size = inner.effective_lr()  # on all ranks: a sharded one is reduced here
        if size is not None:
            logs["optim/effective_lr"] = size


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class LossAwareMixin(_Base):
    """Give the training loss to the optimizer, in any Trainer: `class MyTrainer(LossAwareMixin, SFTTrainer)`.

    The loss is the one back-propagated, summed over the micro-batches of a step and averaged over ranks, whatever
    computed it. `optim/effective_lr` is added to the logs.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        deliver_loss(self.accelerator)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        add_effective_lr(self.optimizer, logs)
        super().log(logs, *args, **kwargs)


class LossAwareTrainer(LossAwareMixin, Trainer):
    """A [`~transformers.Trainer`] for every optimizer, whether it needs the loss or not.

    A step whose loss or gradient norm is not finite is skipped on all ranks alike, counted in the logs as
    `optim/skipped_steps`, and ends the run after `max_skipped_steps` in a row: stock Trainer lets one NaN turn every
    weight into NaN, and logs a loss of 0. With fp16 the gradient scaler skips, and under DeepSpeed its engine steps,
    so neither is guarded here.

    Args:
        args, kwargs: as for [`~transformers.Trainer`].
        max_skipped_steps (`int`, *optional*, defaults to 20): skipped steps in a row that end the run.

    Raises:
        `RuntimeError`: from `train()`, after `max_skipped_steps` skipped steps in a row.
    """

    def __init__(self, *args: Any, max_skipped_steps: int = 20, **kwargs: Any) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self._in_a_row = 0
        self._finite: Any = True  # losses of this step so far, on this rank
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._finite = loss.isfinite() & self._finite
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._guard(model, norm)
        return norm

    def _guard(self, model: torch.nn.Module, norm: Any) -> None:
        finite, self._finite = self._finite, True
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            return
        device = self.args.device
        fine = torch.as_tensor(finite, device=device) & torch.as_tensor(norm, device=device).isfinite()
        if bool(mean_over_ranks(fine.float()) == 1):
            self._in_a_row = 0
            return
        model.zero_grad(set_to_none=True)  # nothing to step: weights, state and loss average stay as they are
        self.skipped_steps += 1
        self._in_a_row += 1
        logger.warning("step %d skipped: its loss or gradient norm is not finite", self.state.global_step + 1)
        if self._in_a_row >= self.max_skipped_steps:
            raise RuntimeError(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient norm, the last at step "
                f"{self.state.global_step + 1}. Lower the learning rate, look at the data of these steps, or raise "
                "`max_skipped_steps`"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.skipped_steps and "learning_rate" in logs:
            logs["optim/skipped_steps"] = self.skipped_steps
        super().log(logs, *args, **kwargs)
