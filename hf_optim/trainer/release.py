# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient release in a Trainer: who attaches the hooks, and what cannot go with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from .. import registry
from ..core import Optimizer
from ..core.release import Release, cannot_absorb
from ..registry import OptimInfo
from ..verdicts import Layout, decide
from .layout import of_deepspeed


NO_CLIPPING = (
    "it clips all gradients by their common norm, and released ones never exist together; set `--max_grad_norm 0` "
    "(what clips each tensor, such as adafactor_corrected's `clip_threshold` or `agc=true`, goes with release)"
)


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


# ---- before the run -------------------------------------------------------------------------------------------------
def refuse(info: OptimInfo, options: Mapping[str, Any], args: Any) -> None:
    """Stop a run whose arguments cannot go with `gradient_release=true`.

    Raises:
        `ValueError`: with the argument, the reason and the remedy.
    """
    if not options.get("gradient_release"):
        return
    clashes = {
        "max_grad_norm": NO_CLIPPING if args.max_grad_norm and args.max_grad_norm > 0 else "",
        "auto_find_batch_size": (
            "a batch that does not fit would leave a part of the weights a step ahead; set "
            "`--per_device_train_batch_size`"
        )
        if args.auto_find_batch_size
        else "",
        "gradient_accumulation_steps": _no_accumulation(info, options) if args.gradient_accumulation_steps > 1 else "",
    }
    for name, reason in clashes.items():
        if reason:
            raise ValueError(
                f"{info.name}: `gradient_release=true` cannot go with `{name}={getattr(args, name)}`: {reason}"
            )


def _no_accumulation(info: OptimInfo, options: Mapping[str, Any]) -> str:
    reason = cannot_absorb(info.cls, options)
    if not reason:
        return ""
    infos = map(registry.info, registry.list_optimizers())
    able = [i.name for i in infos if not cannot_absorb(i.cls, i.preset)]
    return (
        f"{reason}. With default options {', '.join(able)} can accumulate released gradients; else "
        "set `--gradient_accumulation_steps 1` and a larger `--per_device_train_batch_size`"
    )


# ---- around backward ------------------------------------------------------------------------------------------------
def handles(accelerator: Accelerator) -> list[Release]:
    """Those of the optimizers of an accelerator that release gradients.

    The hooks are attached here, by whoever is about to run backward: before, accelerate may still replace parameters.
    """
    found = []
    for optimizer in map(innermost, accelerator._optimizers):
        if not isinstance(optimizer, Optimizer):
            continue
        if optimizer._release is None and optimizer.param_groups[0]["gradient_release"]:
            _refuse_engine(accelerator, optimizer)
            optimizer.release_gradients()
        if optimizer._release is not None:
            found.append(optimizer._release)
    return found


def _refuse_engine(accelerator: Accelerator, optimizer: Optimizer) -> None:
    layout = Layout("single", fp16=accelerator.scaler is not None)  # core.release looks at the ranks itself
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        layout = of_deepspeed(accelerator.deepspeed_plugin.deepspeed_config)
    verdict = decide(type(optimizer), {"gradient_release": True}, layout)
    if not verdict.fine:
        raise ValueError(f"{type(optimizer).__name__}: {verdict.reason}")


@contextmanager
def releasing(accelerator: Accelerator) -> Iterator[None]:
    """Around a backward: gradients are released, or absorbed if more micro-batches of the step follow."""
    found = handles(accelerator)
    with ExitStack() as stack:
        if found and not accelerator.sync_gradients:
            for handle in found:
                stack.enter_context(handle.accumulate())
            for model in accelerator._models:
                if isinstance(model, FSDPModule):  # `no_sync` would keep whole, unreduced gradients
                    model.set_requires_gradient_sync(True)
        yield


def unclipped(clip: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.clip_grad_norm_` that refuses to clip what is gone. Trainer asks for the norm with inf."""

    @functools.wraps(clip)
    def wrapper(self: Accelerator, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters)
        if max_norm < math.inf:
            released = {id(part.p) for handle in handles(self) for part in handle.parts}
            if not released.isdisjoint(map(id, parameters)):
                raise ValueError(f"gradients are released, which cannot go with `max_norm={max_norm}`: {NO_CLIPPING}")
        return clip(self, parameters, max_norm, *args, **kwargs)

    return wrapper
