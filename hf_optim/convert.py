# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other implementations, and of our own earlier versions, rewritten for today's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .core import pack_signs, two_largest


def from_transformers_adafactor(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the state of a [`~transformers.Adafactor`] for [`Adafactor`]; any other state is returned as it is.

    Row and column statistics of matrices carry over exactly. Tensors that are factored along other axes here are
    refactored from their rank-one estimate. The momentum, which transformers keeps multiplied by the step size, is
    divided by the last one.
    """
    if not all("clip_threshold" in group and "eps" in group for group in state_dict["param_groups"]):
        return state_dict
    groups, state = [], dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        for key in group["params"]:
            if key in state:
                state[key] = _state(state[key], group)
        steps = [state[key]["step"] for key in group["params"] if key in state]
        groups.append(_group(group) | {"optimizer": "Adafactor", "step": max(steps, default=0)})
    return {**state_dict, "state": state, "param_groups": groups}


def _group(group: dict[str, Any]) -> dict[str, Any]:
    eps1, eps2 = group["eps"]
    kept = {key: value for key, value in group.items() if key not in ("eps", "decay_rate")}
    return kept | {"eps1": eps1, "eps2": eps2, "decay_rate": -group["decay_rate"], "lr": group["lr"] or 0.0}


def _state(old: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    new: dict[str, Any] = {"step": int(old["step"])}
    if "exp_avg_sq" in old:
        new["v"] = old["exp_avg_sq"].float()
    else:
        new["row"], new["col"] = _refactor(old["exp_avg_sq_row"].float(), old["exp_avg_sq_col"].float())
    if group["beta1"] is not None:
        size = _step_size(old, group)
        new["m"] = old["exp_avg"].float() / size if size else old["exp_avg"].float()
    return new


def _refactor(row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """From the last two axes to the two longest."""
    a, b = two_largest((*row.shape, col.shape[-1]))
    if b == row.ndim and a == row.ndim - 1:
        return row, col
    full = (row / row.mean(-1, keepdim=True)).unsqueeze(-1) * col.unsqueeze(-2)
    return full.mean(b), full.mean(a)


def _step_size(old: dict[str, Any], group: dict[str, Any]) -> float:
    size = group["lr"] or 0.0
    if group["relative_step"]:
        size = min(1e-6 * old["step"] if group["warmup_init"] else 1e-2, old["step"] ** -0.5)
    return size * (max(group["eps"][1], float(old["RMS"])) if group["scale_parameter"] else 1.0)


def from_interleaved_signs(state_dict: dict[str, Any]) -> dict[str, Any]:
    """SMMF's bits as its first version packed them (eight neighbours to a byte, `sign`) in the order of `signs`."""
    return {**state_dict, "state": {key: _signs(of_one) for key, of_one in state_dict["state"].items()}}


def _signs(old: dict[str, Any]) -> dict[str, Any]:
    if "sign" not in old:
        return old
    places = 2 ** torch.arange(8, dtype=torch.uint8)
    bits = old["sign"].cpu().unsqueeze(-1).bitwise_and(places) > 0
    kept = {key: value for key, value in old.items() if key != "sign"}
    return kept | {"signs": pack_signs(bits.flatten(1)[:, : len(old["col_m"])].float())}
