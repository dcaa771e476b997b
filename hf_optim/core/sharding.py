# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Everything the engine knows about DTensor and process groups. Optimizer files never mention either."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Slot(NamedTuple):
    """How one state buffer is made.

    `axes[i]` is the parameter axis that dimension `i` of the buffer follows, so that its placement on a device mesh
    follows too; None where there is no such axis. `dtype` None means the compute dtype (fp32, or fp64 for fp64
    weights). `narrow` marks the parameter-sized buffers that `state_dtype` applies to, `positive` those among them
    that are divided by, as second moments are: they need more than 8 bits. `fill` is a number or `"param"`, a copy of
    the parameter.
    """

    shape: tuple[int, ...]
    axes: tuple[int | None, ...]
    dtype: torch.dtype | None = None
    narrow: bool = False
    fill: float | str = 0.0
    positive: bool = False


def like(
    p: Tensor, fill: float | str = 0.0, narrow: bool = True, dtype: torch.dtype | None = None, positive: bool = False
) -> Slot:
    """A buffer with the shape, strides and placement of the parameter."""
    return Slot(tuple(p.shape), tuple(range(p.ndim)), dtype=dtype, narrow=narrow, fill=fill, positive=positive)


def per_block(p: Tensor, length: int) -> Slot:
    """A number for every `length` entries of a row, so that shards of whole rows hold whole blocks."""
    return Slot((p.shape[0], -(-math.prod(p.shape[1:]) // length)), (0, None))


def keep(p: Tensor, *axes: int) -> Slot:
    """A statistic over all axes of the parameter but these; `keep(p)` is a scalar."""
    axes = tuple(sorted(a % p.ndim for a in axes)) if axes else ()
    return Slot(tuple(p.shape[a] for a in axes), axes)


def without(p: Tensor, axis: int) -> Slot:
    """A statistic with one axis of the parameter averaged away."""
    return keep(p, *(a for a in range(p.ndim) if a != axis % p.ndim))


def is_sharded(x: Tensor) -> bool:
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """The shard on this rank; the tensor itself where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def zeros(p: Tensor, slot: Slot, dtype: torch.dtype) -> Tensor:
    """A new buffer for `slot` on the device, and with the placements, of `p`."""
    if slot.fill == "param":
        return p.detach().to(dtype, copy=True)
    if _alike(p, slot):  # full_like keeps strides (channels_last) and every kind of placement
        return torch.full_like(p.detach(), float(slot.fill), dtype=dtype)
    if not isinstance(p, DTensor):
        return torch.full(slot.shape, float(slot.fill), dtype=dtype, device=p.device)
    own, follows = p.to_local(), _follows(p, slot)
    shape = [slot.shape[i] if a is None else own.shape[a] for i, a in enumerate(follows)]
    buffer = torch.full(shape, float(slot.fill), dtype=dtype, device=own.device)
    whole = torch.empty(slot.shape, device="meta")
    return placed(buffer, Layout(p.device_mesh, _placements(p, slot), whole.shape, whole.stride()))


def _alike(p: Tensor, slot: Slot) -> bool:
    """Not by the shape alone: of a (2, 1) weight, the 2 x 1 bytes of packed signs follow axis 0 only."""
    return slot.shape == tuple(p.shape) and slot.axes == tuple(range(p.ndim))


def _follows(p: Tensor, slot: Slot) -> list[int | None]:
    """The parameter axis that each dimension of the buffer is sharded with."""
    return [a if a is not None and slot.shape[i] == p.shape[a] else None for i, a in enumerate(slot.axes)]


def _placements(p: DTensor, slot: Slot) -> tuple[Any, ...]:
    if _alike(p, slot):
        return tuple(p.placements)
    follows = _follows(p, slot)
    return tuple(
        Shard(follows.index(place.dim)) if isinstance(place, Shard) and place.dim in follows else Replicate()
        for place in p.placements
    )


def adopt(x: Tensor, p: Tensor, slot: Slot) -> Tensor:
    """A loaded buffer in the form that `p` needs: of a whole tensor this rank keeps its shard.

    torch.distributed.checkpoint hands 0-d state back as plain tensors, and a checkpoint of one process is whole.
    """
    if not isinstance(p, DTensor) or isinstance(x, DTensor):
        return x
    return distribute_tensor(x, p.device_mesh, _placements(p, slot), src_data_rank=None)


def settle(x: Tensor) -> Tensor:
    """Finish a pending reduction: a Partial result stored as it is would break checkpoints, and `.item()` of it
    silently gives this rank's part (pytorch#166638)."""
    if isinstance(x, DTensor) and any(isinstance(place, Partial) for place in x.placements):
        return x.redistribute(placements=[Replicate() if isinstance(q, Partial) else q for q in x.placements])
    return x


def match(x: Tensor, ref: Tensor) -> Tensor:
    """`x` with the placements of `ref`, ready to be written into it."""
    if isinstance(ref, DTensor) and isinstance(x, DTensor) and x.placements != ref.placements:
        return x.redistribute(placements=ref.placements)
    return x


def beside(x: Tensor, ref: Tensor) -> Tensor:
    """A small constant, on every rank the same, in the form that meets `ref`: DTensors refuse plain tensors."""
    if not isinstance(ref, DTensor):
        return x
    return DTensor.from_local(x, ref.device_mesh, [Replicate()] * ref.device_mesh.ndim, run_check=False)


@dataclass(frozen=True)
class Collective:
    """A functional collective: the operator, its arguments after the tensor, and the size of the tensor."""

    op: Any
    options: tuple[Any, ...]
    numel: int = field(compare=False)

    @property
    def adds(self) -> bool:
        return self.op is torch.ops._c10d_functional.all_reduce.default


class Layout(NamedTuple):
    """Everything about a DTensor but its shards: the same on every rank."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]


def layout(x: Tensor) -> Layout | None:
    return Layout(x.device_mesh, x.placements, x.shape, x.stride()) if isinstance(x, DTensor) else None


def placed(x: Tensor, where: Layout | None) -> Tensor:
    """The tensor of which `x` is the shard on this rank."""
    if where is None:
        return x
    return DTensor.from_local(x, where.mesh, where.placements, run_check=False, shape=where.shape, stride=where.stride)


def exchange(collectives: list[Collective], tensors: list[Tensor]) -> list[Tensor]:
    """Run a collective on each tensor; all that add up alike as one."""
    alike: dict[Any, list[int]] = {}
    for i, (collective, x) in enumerate(zip(collectives, tensors)):
        alike.setdefault((collective, x.dtype, None if collective.adds else i), []).append(i)
    got = list(tensors)
    for (collective, *_), places in alike.items():
        own = [tensors[i] for i in places]
        joined = torch.cat([x.reshape(-1) for x in own]) if collective.adds else own[0]
        result = torch.ops._c10d_functional.wait_tensor(collective.op(joined, *collective.options))
        parts = result.split([x.numel() for x in own]) if collective.adds else [result]
        for i, x, part in zip(places, own, parts):
            got[i] = part.view(x.shape) if collective.adds else part
    return got


@contextmanager
def on_all_or_none(where: Layout | None) -> Iterator[list[list[Collective]]]:
    """A block that fails on every rank if it fails on one, or if what it lists is not the same on all: ranks must not
    wait for each other in different places."""
    sends: list[list[Collective]] = []
    try:
        yield sends
    except Exception:
        _largest([math.inf, math.inf], where)
        raise
    # a group has a name of its own, and shards that are gathered have sizes of their own
    kinds = [[(str(x.op), x.options[:-1], x.adds and x.numel) for x in part] for part in sends]
    code = zlib.crc32(repr(kinds).encode())
    if _largest([code, -code], where) != [code, -code]:
        raise RuntimeError("it failed on another rank, or other collectives are needed there")


def _largest(values: list[float], where: Layout | None) -> list[float]:
    """The largest of each value on any rank."""
    if where is None:
        return values
    x = torch.tensor(values, dtype=torch.float64, device=where.mesh.device_type)
    places = [Partial("max")] * where.mesh.ndim
    return list(DTensor.from_local(x, where.mesh, places, run_check=False).full_tensor().tolist())


def whole(x: Any, device: torch.device | None = None) -> Any:
    """The full value of a reduced (0-d) result as a plain tensor, the same on every rank; moved to `device`."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x if device is None or not isinstance(x, Tensor) else x.to(device)


def unsharded(x: Tensor) -> Tensor:
    """All of a tensor on every rank, by one collective: for rules that work on whole matrices."""
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim) if isinstance(x, DTensor) else x


def amax(x: Tensor, keep_axis: int) -> Tensor:
    """Largest entry of a non-negative tensor along every axis but one. An empty shard counts as 0."""
    if not isinstance(x, DTensor):
        return _amax(x, keep_axis)
    reduced = _amax(x.to_local(), keep_axis)
    places = tuple(
        q if not isinstance(q, Shard) else Shard(0) if q.dim == keep_axis else Partial("max") for q in x.placements
    )
    return settle(placed(reduced, Layout(x.device_mesh, places, torch.Size([x.shape[keep_axis]]), (1,))))


def _amax(x: Tensor, keep_axis: int) -> Tensor:
    others = [a for a in range(x.ndim) if a != keep_axis]
    if not others:
        return x
    return x.amax(others) if x.numel() else x.new_zeros(x.shape[keep_axis])


def flat_offset(p: Tensor) -> int:
    """Index of this rank's first element in the row-major order of the whole parameter.

    Raises:
        `NotImplementedError`: if the shard is not a run of whole rows.
    """
    if not isinstance(p, DTensor) or all(isinstance(place, Replicate) for place in p.placements):
        return 0
    if p.ndim == 0 or any(
        not isinstance(q, (Replicate, Shard)) or (isinstance(q, Shard) and q.dim) for q in p.placements
    ):
        raise NotImplementedError(
            f"`precision='stochastic'` and a narrow `state_dtype` need parameters sharded along dimension 0, got "
            f"{p.placements}; use `precision='kahan'` and `state_dtype='float32'` instead"
        )
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return offset[0] * (p.numel() // max(p.shape[0], 1))


def several_ranks() -> bool:
    return world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if several_ranks() else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add up a tensor over the default process group, in place; a collective call."""
    if several_ranks():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a scalar over the default process group; a collective call where there is more than one rank."""
    return sum_over_ranks(x.clone()) / world_size() if several_ranks() else x


def of_all_ranks(value: Any) -> list[Any]:
    """The value (any Python object) of every rank, on every rank."""
    values: list[Any] = [value] * world_size()
    if several_ranks():
        dist.all_gather_object(values, value)
    return values


def side_by_side(*vectors: Tensor) -> tuple[list[Tensor], slice]:
    """Vectors of the same length, each joined over all ranks and filled up with 0; and where this rank's part is."""
    if not several_ranks():
        return list(vectors), slice(None)
    n = len(vectors[0])
    longest = torch.tensor(n, device=vectors[0].device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    start, after = rank() * int(longest), (world_size() - rank()) * int(longest) - n
    return [sum_over_ranks(torch.nn.functional.pad(x, (start, after))) for x in vectors], slice(start, start + n)
