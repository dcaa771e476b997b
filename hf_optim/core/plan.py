# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a step will run on: parameters gathered into calls that share a group, a spec and a step count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from . import precision, sharding
from .codegen import LARGE, SPAN, VECTOR, Program
from .pipeline import Spec


if TYPE_CHECKING:
    from .base import Optimizer


class Kind(NamedTuple):
    """What items have in common that the same compiled code may serve."""

    sizes: tuple[tuple[int, ...], ...]  # of weight, gradient and buffers; 0, 1 and 2 for more
    layouts: tuple[sharding.Layout | None, ...]  # of those that are sharded, with all their sizes
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    dense: bool  # all are contiguous, which compiled code relies on
    large: bool  # reduced, and so large that it fills the cache
    spans: bool  # with rows of whole spans: the code is told how many, and serves any number


@dataclass
class Item:
    """One parameter of a call. `weight` and `bufs` are what the rule runs on: local shards of elementwise rules, flat
    aliases where everything is contiguous, else the tensors themselves."""

    p: Tensor
    state: dict[str, Any]
    index: int  # position among all parameters of the optimizer: part of the rounding noise
    offset: int
    flat: bool
    weight: Tensor
    bufs: dict[str, Tensor]
    pointers: list[int]  # of weight and state, which offloading replaces without telling; none once one is gone
    kept: list[ref[Tensor]]  # that state
    sharded: bool
    kind: Kind

    def given(self, local: bool) -> Tensor:
        g: Any = self.p.grad  # None in another plan
        return sharding.local(g) if local and self.sharded else g

    def gradient(self, local: bool) -> Tensor:
        return self.given(local).view_as(self.weight) if self.flat else self.given(local)  # faster than `view`


@dataclass
class Chunk:
    """Items that one compiled call steps together, and its arguments that stay: weights and state."""

    items: list[Item]
    start: int
    fixed: list[Any]  # and last, if their kind has `spans`, how many make a row
    idle: list[Tensor]  # gradients of zeros that fill it up, to the number of tensors of other chunks
    program: Program
    sums: Any  # the program of what they add to those of the whole model; none for shards


@dataclass
class Call:
    """Items that one piece of code may run on together."""

    position: int  # of the group
    group: dict[str, Any]
    spec: Spec
    items: list[Item] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)  # as they are compiled; empty in the loop

    @property
    def t(self) -> int:
        return self.items[0].state["step"]


def flatten(x: Tensor) -> Tensor:
    """An alias that code for any shape can serve: rows of `VECTOR` elements where that fits, else a vector."""
    n = x.numel()
    return x.view((n // VECTOR, VECTOR) if n % VECTOR == 0 else (n,)).detach()  # a view would keep `x` alive


class Plan:
    """The calls of one step. Rebuilt when the set of gradients, a storage or a group changes."""

    def __init__(self, optimizer: Optimizer, scalars: list[dict[str, Tensor]]) -> None:
        self.signature, self.idle = signature(optimizer), [p for p in optimizer.parameters() if p.grad is None]
        self.calls = _gather(optimizer, scalars)
        items = [item for call in self.calls for item in call.items]
        self.unchanged = watch(items)
        self.numel = sum(item.p.numel() for item in items)  # of all ranks: they compile together or not at all

    def current(self, optimizer: Optimizer) -> bool:
        idle = all(p.grad is None for p in self.idle)
        return idle and self.signature == signature(optimizer) and self.unchanged()


def watch(items: list[Item]) -> Callable[[], bool]:
    """Asks whether storage, state and gradients are as code was made for: of all at once, it is faster."""
    params, states = [item.p for item in items], [(item.state, name) for item in items for name in item.bufs]
    pointers = [item.pointers for item in items]
    known = [own[0] for own in pointers] + [x for own in pointers for x in own[1:]]
    grads, some_sharded = [item.given(local=True) for item in items], any(item.sharded for item in items)
    strides: Any = [[step if n > 1 else None for n, step in zip(g.shape, g.stride())] for g in grads]
    sizes: Any = [[*g.shape] for g in grads]  # guards look at type, layout, dtype and device, too
    seen = TensorGuards(*grads, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def current() -> bool:
        given: list[Any] = [p.grad for p in params]
        tensors = [*params, *[state[name] for state, name in states]]
        if some_sharded:
            given, tensors = [*map(sharding.local, given)], [sharding.local(x.detach()) for x in tensors]
        return all(pointers) and [*map(Tensor.data_ptr, tensors)] == known and seen.check(*given)

    return current


def signature(optimizer: Optimizer) -> list[Any]:
    """Static options of every group; parameters (which of them train) and state, by identity: keys would be hashed."""
    static, groups, params = optimizer.static_options(), optimizer.param_groups, [*optimizer.parameters()]
    options = [([v for k, v in group.items() if k in static], len(group["params"])) for group in groups]
    return [options, [p.requires_grad for p in params], [*map(id, params)], [*map(id, optimizer.state.values())]]


def with_gradient(optimizer: Optimizer) -> list[tuple[int, int, Tensor]]:
    """(index, position of the group, parameter) for every parameter that this step will move."""
    return [(i, k, p) for i, (p, k) in enumerate(optimizer.placed()) if p.grad is not None and p.numel()]


def _gather(optimizer: Optimizer, scalars: list[dict[str, Tensor]]) -> list[Call]:
    calls: dict[Any, Call] = {}
    for index, position, p in with_gradient(optimizer):
        group, state = optimizer.param_groups[position], optimizer.state[p]
        spec = optimizer.spec(group, p, scalars[position])
        item = make_item(spec, p, state, index)
        key = (position, spec, state["step"], item.kind)
        calls.setdefault(key, Call(position, group, spec)).items.append(item)
    return list(calls.values())


def _watched(buffer: Tensor, pointers: list[int], *aliases: Tensor) -> ref[Tensor]:
    """A reference to a state buffer. When that is moved away (to offload it, say), these let go of memory at once."""

    def let_go(_: Any) -> None:
        pointers.clear()  # they may be those of other tensors now
        for alias in aliases:
            alias.data = alias.new_empty(0)  # by `set_`, the weight would count as changed

    return ref(buffer, let_go)


def make_item(spec: Spec, p: Tensor, state: dict[str, Any], index: int) -> Item:
    layout = getattr(p.grad, "layout", None)
    if p.grad is None or layout != torch.strided:
        raise RuntimeError(f"{spec.rule.__name__} needs dense gradients, got {layout}: use `sparse=False`")
    weight, g, bufs = p.detach(), p.grad, {name: state[name].detach() for name in spec.stored}
    if spec.elementwise:
        weight, g = sharding.local(weight), sharding.local(g)
        bufs = {name: sharding.local(b) for name, b in bufs.items()}
    pointers = [sharding.local(x).data_ptr() for x in (weight, *bufs.values())]
    dense = weight.numel() > 0 and all(sharding.local(x).is_contiguous() for x in (weight, g, *bufs.values()))
    flat = spec.elementwise and dense and all(b.shape == weight.shape for b in bufs.values())
    if flat:
        weight, g, bufs = flatten(weight), flatten(g), {name: flatten(b) for name, b in bufs.items()}
    kept = [_watched(state[name], pointers, sharding.local(weight), sharding.local(b)) for name, b in bufs.items()]
    offset = precision.int32(sharding.flat_offset(p)) if spec.noisy else 0
    tensors = [weight, g, *bufs.values()]
    sizes = tuple(tuple(min(size, 2) for size in x.shape) for x in tensors)
    layouts, dtypes = tuple(map(sharding.layout, tensors)), tuple(x.dtype for x in tensors)
    large = not spec.elementwise and weight.numel() >= LARGE
    spans = large and weight.is_cpu and weight.shape[-1] % SPAN == 0 and not layouts[0]
    kind = Kind(sizes, layouts, dtypes, weight.device, dense, large, spans)
    return Item(p, state, index, offset, flat, weight, bufs, pointers, kept, sharding.is_sharded(p), kind)
