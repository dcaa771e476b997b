# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Small formulas that several papers share. Everything here works on plain tensors and on DTensors alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import back, exact
from .sharding import amax as amax  # a formula, too, to those who import from here
from .sharding import beside, settle


NARROW = 3  # bytes of a word: fp32 counts up to 2^24 exactly


def rms(x: Tensor) -> Tensor:
    """Root mean square of all entries, a 0-d tensor."""
    return averaged(x.square()).sqrt()


def at_most(x: Tensor, size: Tensor, limit: Tensor) -> Tensor:
    """`x` scaled down to `limit` where its `size` is larger."""
    return x * (limit / size.where(size > limit, limit))


def factored_rsqrt(row: Tensor, col: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """The two factors R, C with `R_i C_j = 1 / sqrt(row_i col_j / mean)`, for statistics without axis b and axis a.

    Both have the same mean; that of `col` is taken, which every rank knows where rows are sharded. Formed in float64
    and rounded once: no ratio of tiny numbers is taken, so a dead row crossed with a dead column stays finite, and two
    fp32 multiplications are all that a matrix entry sees.
    """
    row64, col64 = exact(row), exact(col)
    mean = averaged(col64, [b - 1]).unsqueeze(a)
    return back(row64.rsqrt() * mean.sqrt(), row), back(col64.rsqrt(), col)


def summed(x: Tensor, axis: int) -> Tensor:
    """The sum over an axis, added up over ranks at once: left pending, every use of it would do so."""
    return settle(x.sum(axis))


def averaged(x: Tensor, axes: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The mean over axes (none: over all), as [`summed`]. Of uneven shards `x.mean` would gather `x` on every rank."""
    axes = tuple(axes) or tuple(range(x.ndim))
    return settle(x.sum(axes, keepdim)) / math.prod(x.shape[a] for a in axes)


def along(vector: Tensor, axis: int, ndim: int) -> Tensor:
    """A statistic per index of one axis, shaped to be combined with the whole tensor."""
    return vector.view([-1 if a == axis else 1 for a in range(ndim)])


def two_largest(shape: Sequence[int]) -> tuple[int, int]:
    """The two longest axes, in order; the later ones win a tie (the last two of a stack of square matrices)."""
    axes = list(reversed(range(len(shape))))  # compared by `>` only: sizes may be symbols of the compiler
    first = max(axes, key=shape.__getitem__)
    axes.remove(first)
    second = max(axes, key=shape.__getitem__)
    return (first, second) if first < second else (second, first)


def square_shape(numel: int) -> tuple[int, int]:
    """The factorisation `(a, b)` of `numel` nearest to a square, a >= b; (numel, 1) for a prime."""
    b = next(d for d in range(math.isqrt(numel), 0, -1) if numel % d == 0) if numel else 1
    return numel // b, b


def pack_signs(x: Tensor) -> Tensor:
    """Bits `x > 0` of an (m, n) matrix as (m, w = ceil(n / 8)) uint8: bit k of byte j is that of column k w + j.

    A row is eight runs of w columns: a CPU packs and unpacks runs in vectors, which it cannot do with neighbours. Rows
    that are shorter than a vector are packed as words.
    """
    m, n = x.shape
    w = -(-n // 8)
    if 0 < w <= NARROW:
        word = torch.where(x > 0, back(_places(n, x), x), 0.0).sum(1)
        # no shifts of what may be sharded: those of a DTensor are silently wrong (torch 2.13)
        high = [(word / 256**j).floor() for j in range(w)] + [0.0]
        packed = torch.stack([a - 256 * b for a, b in zip(high, high[1:])], 1)
    else:
        runs = (torch.nn.functional.pad(x, (0, 8 * w - n)) if n % 8 else x).view(m, 8, w)
        packed = functools.reduce(torch.add, (torch.where(runs[:, k] > 0, 2.0**k, 0.0) for k in range(8)))
    return packed.to(torch.uint8)


def with_signs(size: Tensor, packed: Tensor) -> Tensor:
    """An (m, n) matrix with the signs of [`pack_signs`]: minus where the bit is 0."""
    n, w = size.shape[1], packed.shape[1]
    if 0 < w <= NARROW:
        places = _places(n, size)
        word = functools.reduce(torch.add, (back(packed[:, j : j + 1], places) * 256**j for j in range(w)))
        bits = word.bitwise_and(places)
    else:
        places = back(1 << (torch.arange(8 * w, dtype=torch.int32, device=size.device) // w), packed)
        bits = back(packed.unsqueeze(1).bitwise_and(beside(places.view(8, w), size)).flatten(1), size)
    return torch.where((bits if bits.shape[1] == n else bits[:, :n]) > 0, size, -size)


def _places(n: int, ref: Tensor) -> Tensor:
    """The bit of each column in the word that the bytes of its row make."""
    column, w = torch.arange(n, dtype=torch.int32, device=ref.device), int(-(-n // 8))  # not a symbol to divide by
    return beside(1 << (column // w + 8 * (column % w)), ref)
