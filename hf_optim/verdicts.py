# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where an optimizer is right: the one decision behind `hf-optim check`, `hf-optim show` and the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .core import Optimizer
from .core.flags import chosen
from .core.pipeline import View


TITLES = {
    "single": "a single device",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "fsdp1": "FSDP1",
    "zero1": "DeepSpeed ZeRO 1",
    "zero2": "DeepSpeed ZeRO 2",
    "zero3": "DeepSpeed ZeRO 3",
    "tp": "tensor parallelism",
}
TAKEN_APART = {  # what such a layout hands to the optimizer in place of the weights
    "fsdp1": "flat pieces of them; use FSDP2 (`fsdp_version: 2`) or DDP",
    "zero": "one flat vector cut across all of them; use FSDP2 or DDP",
    "tp": "shards along any axis, which is not tested; use FSDP2 or DDP",
}
RELEASED_IN = {"single", "fsdp2"}  # where a gradient is complete when its hook runs
PLAIN = {"precision": ("nearest", "kahan"), "state_dtype": ("float32",)}  # rounded without noise
MATRIX_COST = "collectives for each tensor in every step"
SUMS_COST = "a reduction of a few numbers over the ranks in every step"


@dataclass(frozen=True)
class Layout:
    """How a run is distributed, as far as it matters to an optimizer.

    Args:
        kind (`str`): a key of `TITLES`.
        swap (`str`, *optional*): why another optimizer than the chosen one would run, and the remedy.
        offload (`bool`, *optional*): optimizer state lives, and steps are made, in CPU memory.
        fp16 (`bool`, *optional*): a gradient scaler is at work.
    """

    kind: str
    swap: str = ""
    offload: bool = False
    fp16: bool = False

    def __post_init__(self) -> None:
        if self.kind not in TITLES:
            raise ValueError(f"unknown layout {self.kind!r}; known are {', '.join(TITLES)}")


@dataclass(frozen=True)
class Verdict:
    """`reason` says why the optimizer must not be used and what to do; `cost` what it takes where it may."""

    layout: Layout
    reason: str = ""
    cost: str = ""

    @property
    def fine(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"no: {self.reason}"
        return f"fine, with a cost: {self.cost}" if self.cost else "fine"


def decide(cls: type[Optimizer], options: Mapping[str, Any], layout: Layout) -> Verdict:
    """Whether a step under `layout` is the step on whole tensors, for a class with these options."""
    values = cls.completed(options)
    if layout.swap:
        return Verdict(layout, layout.swap)
    if values["gradient_release"] and layout.kind not in RELEASED_IN:
        why = "`gradient_release=true` needs a complete gradient for each weight when its hook runs, which it is not"
        return Verdict(layout, f"{why} under {TITLES[layout.kind]}; use FSDP2, or drop it")
    if values["gradient_release"] and layout.fp16:
        why = "`gradient_release=true` leaves no gradients to the scaler of fp16, which looks at all before a step"
        return Verdict(layout, f"{why}; use bf16, or drop it")
    costs = ["steps on the CPU"] if layout.offload else []
    reason = ""
    if layout.kind == "fsdp2":
        matrix, sums = _looks_at_tensors(cls, values), _looks_at_model(cls, values)
        reason = cls.needs_whole(View(values))
        costs += [MATRIX_COST] if matrix else [SUMS_COST] if sums else []
    elif layout.kind not in ("single", "ddp"):
        reason = _refused(cls, values, layout.kind)
    return Verdict(layout, reason, "" if reason else ", ".join(costs))


def _refused(cls: type[Optimizer], values: dict[str, Any], kind: str) -> str:
    """Why the options are wrong on parts of tensors that do not know of each other; empty if they are right."""
    got = TAKEN_APART[kind if kind in TAKEN_APART else "zero"]
    matrix, sums = _looks_at_tensors(cls, values), _looks_at_model(cls, values)
    if matrix:
        return f"{matrix} looks at the shape, norm or mean of whole weights, and {TITLES[kind]} gives it {got}"
    if sums:
        return f"{sums} sums over all weights of the model, and {TITLES[kind]} gives each rank {got}"
    if kind == "zero3" and (cls.needs_loss or cls.shared):
        return (
            f"{cls.__name__} counts on one call of `step()` for all weights, and DeepSpeed ZeRO 3 makes one for each "
            "of its sub-groups; use ZeRO 1 or 2, FSDP2 or DDP"
        )
    if kind != "tp" and values["state_dtype"] == "int8":
        return (
            f"`state_dtype=int8` codes the rows of matrices, and {TITLES[kind]} gives it {got}; or use "
            "`state_dtype=bfloat16`"
        )
    noisy = [f"{name}={values[name]}" for name, plain in PLAIN.items() if values[name] not in plain]
    if kind == "tp" and noisy:
        return (
            f"the noise of `{noisy[0]}` needs shards along dimension 0; use `precision=kahan`, `state_dtype=float32`"
        )
    return ""


def _looks_at_tensors(cls: type[Optimizer], values: dict[str, Any]) -> str:
    """The class or flag that is wrong on a piece of a tensor."""
    if cls.needs_matrix or not cls.elementwise:
        return cls.__name__
    return next((f"`{f.flag}={f.value}`" for f in chosen(values, cls.flags()) if not f.elementwise), "")


def _looks_at_model(cls: type[Optimizer], values: dict[str, Any]) -> str:
    """The class or flag that sums over the model."""
    h = View(values)
    if cls.sums(h):
        return cls.__name__
    return next((f"`{f.flag}={f.value}`" for f in chosen(values, cls.flags()) if f.sums(cls, h)), "")


def table(cls: type[Optimizer], options: Mapping[str, Any]) -> dict[str, str]:
    """The verdicts by family of layouts, as `hf-optim show` prints them."""
    found = {kind: str(decide(cls, options, Layout(kind))) for kind in TITLES}
    stages = [found["zero2"], found["zero3"]]
    zero = stages[0] if stages[0] == stages[1] else f"{stages[0]}; at stage 3 {stages[1]}"
    return {"ddp": found["ddp"], "fsdp2": found["fsdp2"], "fsdp1": found["fsdp1"], "zero": zero}
