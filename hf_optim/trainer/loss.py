# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What optimizers need around backward, the loss and hooks; and a Trainer that skips steps that would do harm."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback

from ..core import Optimizer
from ..core.sharding import mean_over_ranks, whole
from .release import handles, innermost, releasing, unclipped
from .resume import complete_checkpoint, withdraw_checkpoint


logger = logging.getLogger(__name__)


def delivering(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.backward` that first hands the loss of the whole accumulation window to the optimizers.

    Before, not after: under DeepSpeed, and where gradients are released, the optimizer steps inside the call.
    """
    if getattr(backward, "_delivers_loss", False):
        return backward

    @functools.wraps(backward)
    def wrapper(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> Any:
        wanting = [o for o in map(innermost, self._optimizers) if getattr(o, "needs_loss", False)]
        if wanting:
            _deliver(self, wanting, loss, kwargs)
        with releasing(self):
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
            if optimizer._loss is not None and not deepspeed and accelerator.scaler is None:
                _warn_replaced(type(optimizer).__name__)
            optimizer.report_loss(window)
            optimizer.keeps_loss = deepspeed  # it steps group by group
        window = 0.0
    accelerator._loss_of_window = window


@functools.cache
def _warn_replaced(name: str) -> None:
    logger.warning(
        "%s got a loss before it stepped with the last one: it takes the last. Where several backward passes (or "
        "several optimizers) make a step, call its `report_loss` with their sum before `step()`", name,
    )  # fmt: skip


def deliver_loss(accelerator: Accelerator) -> None:
    """Make one accelerator deliver the loss to its optimizers, and release the gradients of those that ask for it;
    idempotent."""
    accelerator.backward = types.MethodType(delivering(type(accelerator).backward), accelerator)
    accelerator.clip_grad_norm_ = types.MethodType(unclipped(type(accelerator).clip_grad_norm_), accelerator)


def divide_once(trainer: Trainer) -> None:
    """Trainer divides the loss by the accumulation steps itself; before transformers 5.8 accelerate then did so again,
    which made every gradient (and every reported loss) of an accumulated step too small."""
    trainer.accelerator.gradient_accumulation_steps = 1


def forget_window(trainer: Trainer) -> None:
    """Start with nothing: an earlier run may have ended in the middle of an accumulation window."""
    trainer.accelerator._loss_of_window = 0.0


def add_effective_lr(optimizer: Any, logs: dict[str, Any]) -> None:
    """Put the step size that was really used next to the scheduler's `learning_rate`."""
    inner = innermost(optimizer)
    if "learning_rate" in logs and isinstance(inner, Optimizer):
        if inner._release is not None:
            logs.pop("grad_norm", None)  # the norm of what was left after the step: 0
        size = inner.effective_lr()  # on all ranks: a sharded one is reduced here
        if size is not None:
            logs["optim/effective_lr"] = size


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class LossAwareMixin(_Base):
    """Give the training loss to the optimizer, in any Trainer: `class MyTrainer(LossAwareMixin, SFTTrainer)`.

    The loss is the one back-propagated, summed over the micro-batches of a step (one backward pass each) and averaged
    over ranks, whatever computed it. `optim/effective_lr` is added to the logs. `train(resume_from_checkpoint=...)`
    takes complete checkpoints only. With `--optim_args gradient_release=true` every parameter is stepped inside
    backward, and `grad_norm`, which nobody can know then, is left out of the logs.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        return super().train(complete_checkpoint(self, resume_from_checkpoint), *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        forget_window(self)
        return super()._inner_training_loop(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        withdraw_checkpoint(self)
        super()._save_checkpoint(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        divide_once(self)
        deliver_loss(self.accelerator)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        add_effective_lr(self.optimizer, logs)
        super().log(logs, *args, **kwargs)


class _BeforeStep(TrainerCallback):
    def __init__(self, trainer: LossAwareTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trainer.guard_step(model)


class LossAwareTrainer(LossAwareMixin, Trainer):
    """A [`~transformers.Trainer`] for every optimizer, whether it needs the loss or not.

    A step whose loss or gradient norm is not finite is skipped on all ranks alike, counted in the logs as
    `optim/skipped_steps`, and ends the run after `max_skipped_steps` in a row: stock Trainer lets one NaN turn every
    weight into NaN, and logs a loss of 0. With fp16 the gradient scaler skips, and under DeepSpeed its engine steps,
    so neither is guarded here. Where gradients are released, only the loss is guarded (what earlier micro-batches of
    a skipped step gave to the state stays there): a gradient that is not finite has been used when it could be seen.

    Args:
        args, kwargs: as for [`~transformers.Trainer`].
        max_skipped_steps (`int`, *optional*, defaults to 20): skipped steps in a row that end the run.

    Raises:
        `RuntimeError`: from `train()`, after `max_skipped_steps` skipped steps in a row.
    """

    def __init__(self, *args: Any, max_skipped_steps: int = 20, **kwargs: Any) -> None:
        self.max_skipped_steps = max_skipped_steps
        self._reset()
        super().__init__(*args, **kwargs)
        self.add_callback(_BeforeStep(self))

    def _reset(self) -> None:
        self.skipped_steps = self._in_a_row = 0
        self._finite: Any = True  # losses of this step so far, on this rank
        self._norm: Any = None  # gradient norm of this step before clipping

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._reset()
        return super()._inner_training_loop(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip(*args, **kwargs)
            return self._norm

        backward = self.accelerator.backward

        def guarded(loss: torch.Tensor, **kwargs: Any) -> Any:
            self.guard_loss(loss)
            return backward(loss, **kwargs)

        self.accelerator.clip_grad_norm_, self.accelerator.backward = clip_grad_norm_, guarded

    def guard_loss(self, loss: torch.Tensor) -> None:
        """Where gradients are released the step is made by backward: keep a loss from it that would do harm."""
        found = handles(self.accelerator)
        if found and not self._everywhere(loss.detach().isfinite().all()):
            self._finite = False
            for handle in found:
                handle.skip()

    def _everywhere(self, fine: torch.Tensor) -> bool:
        return bool(mean_over_ranks(fine.to(self.args.device).float()) == 1)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._finite = loss.isfinite() & self._finite
        return loss

    def guard_step(self, model: torch.nn.Module) -> None:
        """Drop the gradients of a step that would do harm; called after clipping, before `optimizer.step()`."""
        finite, norm = self._finite, self._norm
        self._finite, self._norm = True, None
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            return
        if norm is None:  # nothing was clipped
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = whole(norm) if isinstance(norm, torch.Tensor) else torch.tensor(float(norm))
        device = self.args.device
        fine = torch.as_tensor(finite, device=device) & norm.to(device).isfinite()
        if self._everywhere(fine):
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
