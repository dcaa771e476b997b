# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a histogram says about its tail: bins, figures of a tensor, and the groups of parameters they are drawn for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


CHUNK = 2**20  # entries that are upcast at a time

# ---- bins: sign, exponent and first two mantissa bits of an fp32 number, read as an integer -------------------------
SIGN = 1024
NORMAL = 4  # codes of magnitudes below are those of zero and the subnormal numbers
FINITE = 1020  # codes of magnitudes below: finite; from here on infinities and NaN
CODES = 2 * SIGN
WIDTH = 2 * CODES + 2  # counts, sums of squares, sum, sum of fourth powers
EDGES = np.append((np.arange(FINITE, dtype=np.int32) << 21).view(np.float32).astype(np.float64), 2.0**128)


def tally(x: Tensor) -> Tensor:
    """Count the entries of a tensor per bin.

    The bins are exact for all dtypes but fp64, whose entries are rounded to fp32 to find their bin.

    Returns:
        `WIDTH` fp64 numbers on the device of `x`, which add up over tensors and ranks: the counts, and the sums of
        squares, of the `CODES` bins; then the sum, and the sum of fourth powers, of the finite entries.
    """
    row = torch.zeros(WIDTH, dtype=torch.float64, device=x.device)
    counts, squares, sums = row.split((CODES, CODES, 2))
    for chunk in x.detach().reshape(-1).split(CHUNK):
        codes = ((chunk.float().view(torch.int32) >> 21) & (CODES - 1)).long()
        value = chunk.double().nan_to_num(0.0, 0.0, 0.0)
        square = value.square()
        # not bincount, which waits for the device
        counts.scatter_add_(0, codes, torch.ones_like(value))
        squares.scatter_add_(0, codes, square)
        sums += torch.stack((value.sum(), square.square().sum()))
    return row


@dataclass(frozen=True)
class Tail:
    """What a row of [`tally`] says about the finite entries of a group.

    Args:
        edges (`np.ndarray`), counts (`np.ndarray`):
            The histogram, from the first occupied bin to the last: `counts[i]` entries lie between `edges[i]` and
            `edges[i + 1]`. Every octave of |x| is cut in four at 1, 1.25, 1.5 and 1.75 times a power of two, from
            2^-126 to 2^128, on either side of a bin around zero, (-2^-126, 2^-126): 2,033 bins, of which empty
            neighbours are joined.
        sum (`float`), squares (`float`): sums of x and of x^2.
        kurtosis (`float` or None): E x^4 / (E x^2)^2 about zero, of all entries; 3 for a normal distribution.
        top_share (`float` or None):
            Share of the sum of squares that the largest 1 % of the entries (rounded up) hold; 0.085 for a normal
            distribution. Bins above the 99th percentile are exact, from their sums of squares; of the one that it
            cuts, the middle between the least and the most that its count and sum of squares allow, which is off by
            at most 1/18 of the share of that one bin (if it is not the one around zero).
        nonfinite (`int`): entries that are infinite or NaN.

    `kurtosis` and `top_share` are None where all finite entries are zero.
    """

    edges: np.ndarray
    counts: np.ndarray
    sum: float
    squares: float
    kurtosis: float | None
    top_share: float | None
    nonfinite: int


def read(row: np.ndarray) -> Tail:
    """The figures of a row of [`tally`]."""
    signed, squared = row[:CODES].reshape(2, SIGN), row[CODES : 2 * CODES].reshape(2, SIGN)
    positive, negative = signed[:, :FINITE]
    near_zero = signed[:, :NORMAL].sum()
    counts = np.concatenate([negative[: NORMAL - 1 : -1], [near_zero], positive[NORMAL:]])
    edges = np.concatenate([-EDGES[: NORMAL - 1 : -1], EDGES[NORMAL:]])
    occupied = np.flatnonzero(counts)
    if len(occupied):
        counts, edges = counts[occupied[0] : occupied[-1] + 1], edges[occupied[0] : occupied[-1] + 2]
    kept = (counts > 0) | (np.append(counts[1:], 0) > 0)  # the last bin of an empty run stands for all of it
    counts, edges = counts[kept], np.append(edges[:1], edges[1:][kept])
    squares, fourth, n = squared.sum(), row[-1], counts.sum()
    return Tail(
        edges=edges,
        counts=counts,
        sum=float(row[-2]),
        squares=float(squares),
        kurtosis=float(n * fourth / squares**2) if squares else None,
        top_share=_top_share(positive + negative, squared.sum(0)[:FINITE]) if squares else None,
        nonfinite=int(signed[:, FINITE:].sum()),
    )


def _top_share(counts: np.ndarray, squares: np.ndarray) -> float:
    top = math.ceil(counts.sum() / 100)
    reached = counts[::-1].cumsum()
    cut = FINITE - 1 - int(np.searchsorted(reached, top))  # the bin that holds the last of the top entries
    rest = top - counts[cut + 1 :].sum()
    least = rest * squares[cut] / counts[cut]
    most = min(squares[cut] - (counts[cut] - rest) * EDGES[cut] ** 2, rest * EDGES[cut + 1] ** 2)
    return float((squares[cut + 1 :].sum() + (least + most) / 2) / squares.sum())


# ---- groups of parameters ------------------------------------------------------------------------------------------
LEVELS = ("block", "layer", "role")


def group_of(name: str, level: str) -> str:
    """The group of a parameter: the path of its module, cut behind the first number in it.

    Of `model.layers.0.self_attn.q_proj.weight`, level `block` gives `model.layers.0.self_attn`, `layer` gives
    `model.layers.0` and `role` gives `model.layers.self_attn`. Without a number, all give the path of the module.
    """
    parts = [part for part in name.split(".") if not part.startswith("_")]  # without those of wrappers: _orig_mod
    path = parts[:-1] or parts
    number = next((i for i, part in enumerate(path) if part.isdigit()), len(path))
    if level == "role":
        path = path[:number] + path[number + 1 : number + 2]
    return ".".join(path[: number + (1 if level == "layer" else 2)]) or "model"


def group_names(names: list[str], group_by: str | Callable[[str], str], max_groups: int) -> list[str]:
    """The group of every parameter.

    Raises:
        `ValueError`: if these are more than `max_groups` groups.
    """
    made: list[str] = []
    for level in LEVELS if group_by == "auto" else (group_by,):
        made = [group_of(name, level) if isinstance(level, str) else level(name) for name in names]
        if len(set(made)) <= max_groups:
            return made
    raise ValueError(
        f"GradientTails: group_by={group_by!r} makes {len(set(made))} groups of the {len(names)} parameters, "
        f"more than max_groups={max_groups}. Raise `max_groups`, or pass as `group_by` a coarser level "
        f"({', '.join(LEVELS)}) or a function from a parameter's name to its group"
    )
