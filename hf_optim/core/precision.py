# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The only file that casts: how weights, gradients and state are read into compute precision and written back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST = 1e15  # of a gradient entry; the sum of 1e8 squares is still finite
_MASK32 = 0xFFFFFFFF


def state_dtype(p: Tensor, wanted: str) -> torch.dtype:
    """The dtype of a state buffer of `p`: what `wanted` names, but float64 for float64 weights."""
    return torch.float64 if p.dtype == torch.float64 else STATE_DTYPES[wanted]


def slot_dtype(p: Tensor, slot: Any, wanted: str) -> torch.dtype:
    """What a [`Slot`] of `p` is stored in: its own dtype, else that of `state_dtype`, which is `wanted`, or fp32."""
    return slot.dtype or state_dtype(p, wanted if slot.narrow else "float32")


def widen(x: Tensor) -> Tensor:
    """fp16/bf16 to fp32, before anything is squared; fp32 and fp64 stay. Codes (uint8) stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def read_gradient(g: Tensor) -> Tensor:
    """In fp32 an entry beyond 1e15 counts as 0: sums of such squares overflow, and no statistic would ever recover.
    NaN and inf (as inf - inf) go on as NaN, to be seen."""
    g = widen(g)
    return g if g.dtype == torch.float64 else torch.where(g.abs() <= LARGEST, g, g - g)


def exact(x: Tensor) -> Tensor:
    """float64 where the device has it: for vectors whose rounding would be felt by a whole matrix."""
    return x if x.device.type == "mps" else x.double()


def lower(x: Tensor, wanted: str) -> Tensor:
    """fp32 as bf16, for iterations that forgive it: where asked for, or with `auto` on a GPU (or for one, on meta)."""
    if x.dtype == torch.float32 and (wanted == "bfloat16" or (wanted == "auto" and x.device.type in ("cuda", "meta"))):
        return x.bfloat16()
    return x


def back(x: Tensor, ref: Tensor) -> Tensor:
    """`x` in the dtype of `ref`, rounded once."""
    return x.to(ref.dtype)


def read_weight(p: Tensor, residual: Tensor | None) -> Tensor:
    return widen(p) if residual is None else widen(p) + widen(residual)


def write_nearest(buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(value)


def write_stochastic(buffer: Tensor, value: Tensor, noise: Tensor) -> None:
    """Round fp32 to bf16 up or down with probability equal to the distance: unbiased, so small updates add up.

    Works on the integer bits, which Inductor does not fold away. NaN and inf are kept, and a finite value is never
    rounded up to inf (it stays at the largest bf16).
    """
    bits = value.view(torch.int32)
    down = (bits & -65536).view(torch.float32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    rounded = torch.where(rounded.isfinite(), rounded, down)
    buffer.copy_(torch.where(value.isfinite(), rounded, value))


def write_kahan(p: Tensor, residual: Tensor, value: Tensor) -> None:
    """Round to nearest bf16 and keep what was lost in `residual`, to be added back at the next read.

    The rounded value is widened through its integer bits: Inductor folds `value - value.bfloat16().float()` to 0.
    """
    rounded = value.to(torch.bfloat16)
    widened = (rounded.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    residual.copy_(torch.where(widened.isfinite(), value - widened, 0.0))
    p.copy_(rounded)


def noise_bits(value: Tensor, salt: Tensor | int, offset: Tensor | int, channel: int) -> Tensor:
    """16 random bits per element, a function of (salt, offset + position, channel) alone.

    Every replica, every sharding and every resumed run therefore draws the same bits. The mixer is an integer hash
    with full avalanche (two multiplications); int32 arithmetic wraps around, which is what it wants.
    """
    x = torch.arange(value.numel(), dtype=torch.int32, device=value.device).view(value.shape)
    x = (x + offset) * -1640531527 + salt + int32(channel * 668265263)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 2146121005
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return (x ^ (x >> 16)) & 0xFFFF


def salt(seed: int, step: int, index: int) -> int:
    """One int32 from (seed, step, parameter index), mixed on the host in 64 bits (SplitMix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return int32(x ^ (x >> 31))


def int32(x: int) -> int:
    """The low 32 bits of `x` as a signed number."""
    x &= _MASK32
    return x - (1 << 32) if x >> 31 else x
