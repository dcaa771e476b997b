# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The only file that casts: how weights, gradients and state are read into compute precision and written back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
BLOCK = 256  # entries of a row that share a scale, for int8 codes
LEVELS = 127  # codes of either sign
CODED = 4096  # elements from which a tensor is coded: below, there is little to save
ROW = 16  # entries of a row: of shorter ones the scales would take most of what is saved
LARGEST = 1e15  # of a gradient entry; the sum of 1e8 squares is still finite


def state_dtype(p: Tensor, wanted: str) -> torch.dtype:
    """The dtype of a state buffer of `p`: what `wanted` names, but float64 for float64 weights."""
    return torch.float64 if p.dtype == torch.float64 else STATE_DTYPES[wanted]


def slot_dtype(p: Tensor, slot: Any, wanted: str) -> torch.dtype:
    """What a [`Slot`] of `p` is stored in: its own dtype, else that of `state_dtype`, which is `wanted`, or fp32."""
    if wanted == "int8" and not is_coded(p, slot, wanted):
        wanted = "bfloat16" if _is_large(p) else "float32"
    return slot.dtype or state_dtype(p, wanted if slot.narrow else "float32")


def is_coded(p: Tensor, slot: Any, wanted: str) -> bool:
    """Whether a [`Slot`] of `p` is in int8 codes and scales. What is divided by is not: near 0 they are far off."""
    average = slot.narrow and slot.dtype is None and slot.fill == 0 and not slot.positive
    return wanted == "int8" and average and p.dtype != torch.float64 and _is_large(p)


def _is_large(p: Tensor) -> bool:
    return p.ndim > 1 and p.numel() >= CODED and math.prod(p.shape[1:]) >= ROW


def scale_of(name: str) -> str:
    """Name of the state that scales the int8 codes `name`."""
    return f"{name}_scale"


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


def write(buffer: Tensor, value: Tensor, noise: Tensor | None = None) -> None:
    """Round to nearest; with `noise`, fp32 to bf16 up or down with probability equal to the distance: unbiased, so
    small updates add up.

    NaN and inf are kept, and with noise a finite value is never rounded up to inf (it stays at the largest bf16).
    """
    buffer.copy_(value if noise is None else _rounded(value, noise)[0])


def read_codes(codes: Tensor, scale: Tensor) -> Tensor:
    c = codes.float()
    return c * c.abs() * _of_each(scale, c)


def xorsign(x: Tensor, y: Tensor) -> Tensor:
    """`x`, negated where `y` is below 0 or -0.0: above 0 where signs agree. By bits: a product would underflow."""
    whole = torch.int32 if y.dtype == torch.float32 else torch.int64
    return (x.view(whole) ^ (y.view(whole) & torch.iinfo(whole).min)).view(x.dtype)


def write_codes(codes: Tensor, scale: Tensor, value: Tensor, noise: Tensor) -> None:
    """Round fp32 to sign k^2 scale, k = 0 ... 127, up or down with probability equal to the distance: unbiased.

    Squares, since gradients of a block differ by orders of magnitude: an entry 1/1000 of the largest still has codes,
    where the step between even ones would be eight times its size. NaN and inf make their block NaN, to be seen.
    """
    rows = value.abs().flatten(1)
    short = scale.shape[1] * BLOCK - rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, short)) if short else rows
    new = rows.view(rows.shape[0], scale.shape[1], BLOCK).amax(-1) / LEVELS**2
    size = value.abs() / _of_each(new, value)
    k = torch.where(size < 2 * LEVELS**2, size.sqrt().floor(), 0.0)  # of NaN and of 0 / 0; no other is as large
    k = k + ((noise + 0.5) * (2 * k + 1) < (size - k.square()) * 65536)
    codes.copy_(xorsign(k.clamp(max=LEVELS), value))
    scale.copy_(new)


def _of_each(scale: Tensor, entries: Tensor) -> Tensor:
    """The scale of each entry, by its index: of a repeated scale, loops that Inductor writes for a CPU never reach the
    last block where that is shorter than the others (torch 2.13)."""
    block = torch.arange(math.prod(entries.shape[1:]), device=scale.device) // BLOCK
    return scale.index_select(1, block).reshape(entries.shape)


def write_kahan(p: Tensor, residual: Tensor, value: Tensor) -> None:
    """Round to nearest bf16 (half away from 0, as nothing is lost either way, and never to inf) and keep the rest in
    `residual`, to be added back at the next read.

    On the integer bits: Inductor folds `value - value.bfloat16().float()` to 0.
    """
    rounded, fits = _rounded(value, 0x8000)
    residual.copy_(((value - rounded).view(torch.int32) & fits).view(torch.float32))
    p.copy_(rounded)


def _rounded(value: Tensor, noise: Tensor | int) -> tuple[Tensor, Tensor]:
    """fp32 without its lower 16 bits, `noise` added to them before; and all ones where there is a bf16 to round up to,
    0 for the largest, NaN (as arithmetic makes it, quiet) and inf, which stay."""
    bits = value.view(torch.int32)
    fits = ((bits & 0x7FFFFFFF) - 0x7F7F0000) >> 31  # of less than the largest
    return ((bits + (noise & fits)) & -65536).view(torch.float32), fits


def noise_bits(value: Tensor, salt: Tensor | int, offset: Tensor | int, channel: int) -> Tensor:
    """16 random bits per element, a function of (salt, offset + position, channel) alone: the same in every replica,
    sharding and resumed run. An integer hash of two multiplications, whose upper bits are the best mixed; int32 wraps.
    """
    stride, start = -1640531527, salt + int32(channel * 668265263)
    x = torch.arange(value.numel(), dtype=torch.int32, device=value.device).view(value.shape)
    if value.device.type == "cpu":  # Inductor counts by the stride
        x, start = x * stride, offset * stride + start
    else:  # the same numbers; a whole row's stride, which it would take there, is too much for Triton's int32
        x = (x + offset) * stride
    x = x + (start if isinstance(start, Tensor) else int32(start))
    x = (x ^ ((x >> 16) & 0xFFFF)) * 2146121005
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return (x >> 16) & 0xFFFF


def salt(seed: int, step: int, index: int) -> int:
    """One int32 from (seed, step, parameter index), mixed on the host in 64 bits (SplitMix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return int32(x ^ (x >> 31))


def int32(x: int) -> int:
    """The low 32 bits of `x` as a signed number."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
