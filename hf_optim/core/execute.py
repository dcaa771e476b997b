# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Ways to run a call: tensor by tensor in eager PyTorch, or several tensors fused by `torch.compile`."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch._dynamo.exc
import torch._inductor.exc
from torch import Tensor

from . import precision, sharding
from .pipeline import Spec, step_tensor
from .plan import Call, Item


logger = logging.getLogger(__name__)

CHUNK = 8  # tensors per compiled call: a call costs ~30 us of guards, and compile time grows with the chunk
BLOCK = 1 << 17  # elements of a CPU tensor that the eager loop works on at a time
AUTO_NUMEL = 1_000_000  # below this many elements compiling costs more than it will save
COMPILER_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,  # more kinds of shapes than Dynamo wants to compile
    torch._inductor.exc.InductorError,
)
_broken: set[Any] = set()  # optimizers of this process that the compiler has failed on


def salts(call: Call, seed: int, t: int) -> list[tuple[int, int]]:
    """(salt, offset) of every item; zeros where nothing is rounded stochastically."""
    if not call.spec.noisy:
        return [(0, 0)] * len(call.items)
    return [(precision.salt(seed, t, item.index), item.offset) for item in call.items]


def run(call: Call, values: dict[str, Any], noise: list[tuple[int, int]], backend: str) -> list[Any]:
    """Run a call by the `backend` option (`auto` already resolved). Returns the step size used for each item.

    A compiler that fails does so before anything is written: that chunk, and all later ones of that optimizer, go
    through the loop, with one warning.
    """
    used: list[Any] = []
    chunks = _chunks(len(call.items)) if fusable(call.spec, call.items[0].weight, backend) else [(0, len(call.items))]
    for start, stop in chunks:
        items, pairs = call.items[start:stop], noise[start:stop]
        if fusable(call.spec, call.items[0].weight, backend):
            try:
                used += fused(call.spec, items, values, pairs)
                continue
            except COMPILER_ERRORS as error:
                _give_up(call.spec, error)
        used += loop(call.spec, items, values, pairs)
    return used


def loop(spec: Spec, items: list[Item], values: dict[str, Any], noise: list[tuple[int, int]]) -> list[Any]:
    """One item after the other in eager PyTorch; scalars are Python floats."""
    h = spec.hyper(values)
    used = []
    for item, (salt, offset) in zip(items, noise):
        for weight, g, bufs, start in _pieces(item, item.gradient(spec.elementwise)):
            size = step_tensor(spec, weight, g, bufs, h, salt, precision.int32(offset + start))
        used.append(size)
    return used


def _pieces(item: Item, g: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor], int]]:
    """A flat CPU tensor in blocks whose temporaries stay in the cache: fresh large ones cost page faults."""
    n = item.weight.numel()
    if not item.flat or n <= BLOCK or item.weight.device.type != "cpu":
        yield item.weight, g, item.bufs, 0
        return
    for start in range(0, n, BLOCK):
        cut = slice(start, start + BLOCK)
        yield item.weight[cut], g[cut], {name: b[cut] for name, b in item.bufs.items()}, start


def fused(spec: Spec, items: list[Item], values: dict[str, Any], noise: list[tuple[int, int]]) -> list[Any]:
    """One compiled chunk. Scalars travel in one fp32 tensor, so no value ever recompiles."""
    device = items[0].weight.device
    packed = pack([values[name] for name in spec.dynamic], torch.float32, device)
    pairs = pack([x for pair in noise for x in pair], torch.int32, device) if spec.noisy else None
    grads = [item.gradient(spec.elementwise) for item in items]
    weights, bufs = [item.weight for item in items], [item.bufs for item in items]
    chunk, fresh = compiled(spec, len(items), _shape_class(items[0]))
    if fresh:
        fresh.pop()
        _any_size([*weights, *grads, *(b for own in bufs for b in own.values())])
    out = chunk(weights, grads, bufs, packed, pairs)
    return [values["lr"]] * len(items) if out is None else list(out.unbind())


def _chunks(n: int) -> list[tuple[int, int]]:
    """Full chunks, then single items: two sizes of compiled code, whatever the number of tensors."""
    full = n - n % CHUNK
    return [(i, i + CHUNK) for i in range(0, full, CHUNK)] + [(i, i + 1) for i in range(full, n)]


def _any_size(tensors: list[Tensor]) -> None:
    """Compile for sizes in general. (`dynamic=True` would turn the options, Python floats, into variables too.)"""
    for x in tensors:
        for axis, size in enumerate(x.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(x, axis)


def _shape_class(item: Item) -> tuple[int, ...]:
    """Dimensions of size 0 and 1 are constants to the compiler: keep them apart from the dynamic ones."""
    return tuple(min(size, 2) for size in item.weight.shape)


def pack(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers and 0-d tensors in one vector on `device`, without waiting for it."""
    host = torch.tensor([0 if isinstance(x, Tensor) else x for x in numbers], dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory().to(device, non_blocking=True)
    else:
        host = host.to(device)
    for i, x in enumerate(numbers):
        if isinstance(x, Tensor):
            host[i].copy_(x, non_blocking=True)
    return host


@cache
def compiled(spec: Spec, count: int, shape_class: tuple[int, ...]) -> tuple[Any, list[bool]]:
    """The compiled chunk for a spec, and a mark that its first call takes away.

    Each has a code object of its own: Dynamo's recompile limit counts per code object.
    """

    def chunk(
        weights: list[Tensor], grads: list[Tensor], bufs: list[dict[str, Tensor]], packed: Tensor, noise: Tensor | None
    ) -> Tensor | None:
        h = spec.hyper(dict(zip(spec.dynamic, packed.unbind())))
        used = []
        for i in range(count):
            pair = (0, 0) if noise is None else (noise[2 * i], noise[2 * i + 1])
            used.append(step_tensor(spec, weights[i], grads[i], bufs[i], h, *pair))
        return torch.stack(used) if spec.rule.returns_lr else None

    _announce(spec.rule.__name__)
    own = types.FunctionType(
        chunk.__code__.replace(co_name=f"chunk_{spec.rule.__name__}_{count}"),
        chunk.__globals__,
        closure=chunk.__closure__,
    )
    return torch.compile(own, fullgraph=True), [True]


@cache
def _announce(name: str) -> None:
    """Once per optimizer: the pause of the first step should not look like a hang."""
    logger.warning("compiling the step of %s: seconds to a minute, once (`backend='loop'` does without)", name)


def resolve(backend: str, numel: int) -> str:
    """The value of the `backend` option for a step of so many elements: `auto` compiles where it pays."""
    if backend == "auto":
        return "fused" if numel >= AUTO_NUMEL else "loop"
    return backend


def fusable(spec: Spec, weight: Tensor, backend: str) -> bool:
    """Whether a call on tensors like `weight` is compiled."""
    return (
        backend == "fused"
        and spec.rule not in _broken
        and not sharding.is_sharded(weight)  # rules with reductions run on DTensors, eagerly
        and weight.dtype != torch.float64  # scalars travel in fp32
        and weight.numel() > 0
    )


def _give_up(spec: Spec, error: Exception) -> None:
    _broken.add(spec.rule)
    logger.warning(
        "torch.compile failed for %s; the eager loop takes over (`backend='loop'` silences this): %s",
        spec.rule.__name__,
        str(error).strip().split("\n")[0],
    )
