# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Loading that keeps dtypes, and looks before it writes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import precision, sharding
from .pipeline import KAHAN, View
from .sharding import Slot


if TYPE_CHECKING:
    from .base import Optimizer

logger = logging.getLogger(__name__)


def load(optimizer: Optimizer, state_dict: dict[str, Any], torch_load: Callable[[dict[str, Any]], None]) -> None:
    """Run torch's `load_state_dict`, then put the saved tensors back as they were saved.

    torch casts every state tensor to the parameter's dtype (fp32 statistics of bf16 weights, packed bits), in a static
    method that a subclass cannot override. Hooks of the user may replace the dict, so it is captured by a hook that
    runs after theirs.
    """
    captured: dict[str, Any] = {}

    def capture(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        captured.update(optimizer.convert_state_dict(given))
        check(optimizer, captured)
        return captured

    def restore(_: Any) -> None:
        for p, key, slots in saved(optimizer, captured):
            for name, value in captured["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    value = value.detach().to(device=p.device, copy=True)
                    optimizer.state[p][name] = sharding.adopt(value, p, slots[name]) if name in slots else value
                else:
                    optimizer.state[p][name] = copy.deepcopy(value)
            own = optimizer.state.get(p)
            if own and KAHAN in slots:
                own.setdefault(KAHAN, sharding.zeros(p, slots[KAHAN], torch.bfloat16))
            elif own:
                own.pop(KAHAN, None)

    pre = optimizer.register_load_state_dict_pre_hook(capture)
    post = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        torch_load(state_dict)
    finally:
        pre.remove()
        post.remove()


def saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> list[tuple[Tensor, Any, dict[str, Slot]]]:
    """Parameters, each with the key of its saved state and the buffers that it needs with the options saved."""
    groups = [{**optimizer.defaults, **group} for group in state_dict["param_groups"]]  # an older one lacks some
    keys = [(key, View(group)) for group in groups for key in group["params"]]
    return [(p, key, optimizer.slots(p, h)) for p, (key, h) in zip(optimizer.parameters(), keys)]


def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse the checkpoint of another optimizer or model before anything is changed."""
    own = type(optimizer).__name__
    groups = state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
        return  # torch has an error of its own for this, and raises it before it writes
    for group in groups:
        name = group.get("optimizer")
        if name != own:
            what = name or f"another optimizer (its options are {', '.join(k for k in group if k != 'params')})"
            raise ValueError(f"{own} cannot load this checkpoint: it was saved by {what}; nothing was changed")
    for p, key, slots in saved(optimizer, state_dict):
        state = state_dict["state"].get(key)
        kept = {k: x for k, x in (state or {}).items() if isinstance(x, Tensor) and k != "step"}
        plain = {precision.scale_of(k) for k, x in kept.items() if x.is_floating_point()}  # converted: no codes yet
        plain |= {KAHAN} - (slots.keys() & kept.keys())  # weights in another dtype: without it, or it starts at 0
        needed = {name: tuple(slot.shape) for name, slot in slots.items() if name not in plain}
        found = {k: tuple(x.shape) for k, x in kept.items() if k != KAHAN or k not in plain}
        if state and found != needed:
            raise ValueError(
                f"{own} cannot load this checkpoint: parameter {key} of shape {tuple(p.shape)} needs state {needed}, "
                f"the checkpoint has {found}; nothing was changed"
            )
    _tell_overridden(optimizer, groups)


def _tell_overridden(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """A checkpoint brings its options along, as in every torch optimizer: say so where they differ."""
    differ = {
        f"`{name}` {group[name]!r} (not {now[name]!r})"
        for group, now in zip(groups, optimizer.param_groups)
        for name in optimizer.static_options() - {"gradient_release"}  # which stays as it is
        if name in group and group[name] != now[name]
    }
    if differ:
        owner = type(optimizer).__name__
        logger.warning("%s continues with the options of the checkpoint: %s", owner, ", ".join(sorted(differ)))
