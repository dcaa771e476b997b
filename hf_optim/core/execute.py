# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Ways to run a call: tensor by tensor in eager PyTorch, or several tensors in one piece of compiled code."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import codegen, precision, sharding
from .pipeline import Spec, measure_tensor, step_tensor
from .plan import Call, Chunk, Item, Kind
from .sharding import placed


logger = logging.getLogger(__name__)

CHUNK = 16  # tensors per compiled call, at most: compile time grows with it, what a call costs each of them falls
BLOCK = 1 << 17  # elements of a CPU tensor that the eager loop works on at a time
LANES = 64  # of them that the widest CPU kernel takes at a time
AUTO_NUMEL = 1_000_000  # below this many elements compiling costs more than it will save
_broken: set[Any] = set()  # optimizers of this process that the compiler has failed on
_sharded: Counter[Spec] = Counter()  # shapes of sharded tensors that it has worked on

Used = tuple[Any, list[Item]]  # step sizes, in a list or a vector, and the items that were stepped by them


def salts(call: Call, seed: int, t: int) -> list[tuple[int, int]]:
    """(salt, offset) of every item; zeros where nothing is rounded stochastically."""
    noisy = call.spec.noisy
    return [(precision.salt(seed, t, item.index), item.offset) if noisy else (0, 0) for item in call.items]


def ready(call: Call, backend: str) -> bool:
    """Whether to run compiled code, by the `backend` option (`auto` already resolved). A compiler that fails does so
    before anything is written: all steps of that optimizer go through the loop then, with one warning."""
    if not call.items[0].kind.dense or not fusable(call.spec, call.items[0].weight, backend):
        return False
    try:
        call.chunks = call.chunks or chunks(call)
    except Exception as error:  # whatever goes wrong in tracing and compiling: the loop is always right
        _broken.add(call.spec.rule)
        logger.warning(
            "the compiler failed for %s; the eager loop takes over (`backend='loop'` silences this): %s",
            call.spec.rule.__name__,
            str(error).strip().split("\n")[0],
        )
    return bool(call.chunks)


def loop(call: Call, values: dict[str, Any], noise: list[tuple[int, int]]) -> list[Used]:
    """One item after the other in eager PyTorch; scalars are Python floats."""
    spec, h, used = call.spec, call.spec.hyper(values), list[Any]()
    for item, (salt, offset) in zip(call.items, noise):
        for weight, g, bufs, start in _pieces(item, item.gradient(spec.elementwise)):
            size = step_tensor(spec, weight, g, bufs, h, salt, precision.int32(offset + start))
        used.append(size)
    return [(used, call.items)]


def _pieces(item: Item, g: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor], int]]:
    """A flat CPU tensor in blocks whose temporaries stay in the cache: fresh large ones cost page faults.

    The last block is filled up to whole vectors: what is left of one, PyTorch computes by other functions, whose atan2
    or exp differ in the last bit. So an entry would depend on where shards end.
    """
    if not item.flat or item.weight.device.type != "cpu":
        yield item.weight, g, item.bufs, 0
        return
    flat = [x.view(-1) for x in (item.weight, g, *item.bufs.values())]
    for start in range(0, item.weight.numel(), BLOCK):
        cut = [x[start : start + BLOCK] for x in flat]
        short = -cut[0].numel() % LANES
        weight, grad, *bufs = [pad(x, (0, short)) for x in cut] if short else cut
        yield weight, grad, dict(zip(item.bufs, bufs)), start
        if short:
            for x, filled in zip((cut[0], *cut[2:]), (weight, *bufs)):
                x.copy_(filled[: x.numel()])


def fused(call: Call, values: dict[str, Any], noise: list[tuple[int, int]]) -> list[Used]:
    """The compiled chunks."""
    used: list[Used] = []
    for chunk, args in _met(call, values, noise):
        out = chunk.program.code(args)
        used.append((out[0] if call.spec.rule.returns_lr else [values["lr"]] * len(chunk.items), chunk.items))
    return used


def summands(call: Call, values: dict[str, Any], backend: str) -> list[tuple[int, Callable[[], dict[str, Any]]]]:
    """What adds to the whole-model sums, and in which order: those of shards may ask other ranks."""
    spec, h, items = call.spec, call.spec.hyper(values), call.items
    if not ready(call, backend) or not call.chunks[0].sums:
        given = [(item, item.p.detach(), item.given(local=False).detach()) for item in items]
        return [(item.index, partial(measure_tensor, spec, p, g, item.state, h)) for item, p, g in given]

    def compiled() -> dict[str, Any]:
        parts = [chunk.sums.code(args)[0] for chunk, args in _met(call, values, [(0, 0)] * len(items))]  # no noise
        return dict(zip(spec.sums, torch.stack(parts).sum(0)))

    return [(-1, compiled)]


def _met(call: Call, values: dict[str, Any], noise: list[tuple[int, int]]) -> Iterator[tuple[Chunk, list[Any]]]:
    """Every chunk with its arguments; those of sharded tensors after all of them have met the other ranks. Scalars
    travel in one fp32 tensor, so no value ever recompiles."""
    spec, device, program = call.spec, call.items[0].weight.device, call.chunks[0].program
    packed = pack([values.get(name, 0.0) for name in spec.dynamic], torch.float32, device)
    noise = [*noise, *[(0, 0)] * len(call.chunks[-1].idle)]
    pairs: Any = pack([x for pair in noise for x in (*pair, 0, 0)], torch.int32, device) if spec.noisy else None
    adds = all(collective.adds for _, sends in program.before for collective in sends)
    together = len(call.chunks) if program.before and adds else 1  # not where whole tensors are sent
    for first in range(0, len(call.chunks), together):
        batch = call.chunks[first : first + together]
        every = [[*x.fixed, *[item.given(local=True) for item in x.items], *x.idle, packed] for x in batch]
        for x, args in zip(batch, every if spec.noisy else ()):
            args.append(pairs[4 * x.start : 4 * (x.start + len(x.items) + len(x.idle))])
        if program.before:
            program.meet(every)
        yield from zip(batch, every)


def chunks(call: Call) -> list[Chunk]:
    """The items in chunks of one size, the last one filled with zeros or else its items alone: two sizes of code."""
    spec, kind, found, start = call.spec, call.items[0].kind, [], 0
    alone = kind.large or kind.layouts[0]  # what sharded ones ask other ranks for, `meet` joins
    cpu = kind.device.type == "cpu"  # on a GPU a chunk takes few more launches than a tensor
    long = cpu or any(dtype != torch.float32 for dtype in kind.dtypes)  # rounding is as much code again as the rule
    size = 1 if alone else -(-CHUNK // (4 if cpu and not spec.rule.elementwise else 2 if long else 1))
    fill = call.items[0].flat and not spec.sums and len(call.items) > 1
    while start < len(call.items):
        items = call.items[start : start + size]
        items = items if fill or len(items) == size else items[:1]
        found.append(_chunk(spec, items, start, size if fill else len(items)))
        start += len(items)
    return found


def _chunk(spec: Spec, items: list[Item], start: int, count: int) -> Chunk:
    kind, args = items[0].kind, [[x.weight, *x.bufs.values(), x.gradient(local=True)] for x in items]
    least = [codegen.VECTOR if axis else size for axis, size in enumerate(kind.sizes[0])]
    args += [[x.new_zeros(least) for x in args[0]] for _ in range(count - len(items))]
    fixed: list[Any] = [sharding.local(x) for *own, _ in args for x in own]
    fixed += [fixed[0].shape[-1] // codegen.SPAN] if kind.spans else []
    grads = [g for *_, g in args]
    example = [*fixed, *grads, torch.zeros(len(spec.dynamic), dtype=torch.float32, device=kind.device)]
    example += [torch.zeros(4 * count, dtype=torch.int32, device=kind.device)] if spec.noisy else []
    code = partial(programs, spec, kind, count)
    sums = code(True).serving(example) if spec.sums and not any(item.sharded for item in items) else None
    return Chunk(items, start, fixed, grads[len(items) :], code(False).serving(example), sums)


@cache
def programs(spec: Spec, kind: Kind, count: int, sums: bool) -> codegen.Programs:
    """The compiled code for tensors of a kind, `count` at a time: of their step, or of what they add to `sums`."""
    place, of_gradient, *of_bufs = kind.layouts

    def step(*args: Any) -> list[Tensor]:
        rest = iter(args)
        own = [
            (placed(next(rest), place), {k: placed(next(rest), where) for k, where in zip(spec.stored, of_bufs)})
            for _ in range(count)
        ]
        if kind.spans:
            torch._check(own[0][0].shape[-1] == codegen.SPAN * next(rest))  # so no loop needs code for what is left
        grads = [placed(next(rest), of_gradient) for _ in range(count)]
        if spec.elementwise:  # they come as backward left them: a view would cost as much as the rest of a small step
            grads = [g.view_as(weight) for g, (weight, _) in zip(grads, own)]
        scalars = [sharding.beside(x, own[0][0]) for x in next(rest).unbind()]
        h = spec.hyper(dict(zip(spec.dynamic, scalars)))
        if sums:
            found = [measure_tensor(spec, weight, g, bufs, h) for (weight, bufs), g in zip(own, grads)]
            zero = torch.zeros((), device=kind.device)  # parts may be numbers
            return [torch.stack([sum((part[name] for part in found), zero) for name in spec.sums])]
        pairs = next(rest).unbind() if spec.noisy else (0, 0, 0, 0) * count  # 16 bytes each: Inductor aligns inputs
        used = [
            step_tensor(spec, weight, g, bufs, h, pairs[4 * i], pairs[4 * i + 1])
            for i, ((weight, bufs), g) in enumerate(zip(own, grads))
        ]
        return [torch.stack([sharding.whole(size) for size in used])] if spec.rule.returns_lr else []

    tell_once("compiling the step of %s: up to a minute, once (`backend='loop'` does without)", spec.rule.__name__)
    if place:
        _sharded[spec] += 1
        if _sharded[spec] > codegen.LAYOUTS:
            raise RuntimeError(f"more than {codegen.LAYOUTS} shapes of sharded tensors")
    return codegen.Programs(step, count, kind.large, place)


def pack(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers and 0-d tensors in one vector on `device`, without waiting for it."""
    on_gpu, known = device.type == "cuda", [0 if isinstance(x, Tensor) else x for x in numbers]
    host = torch.tensor(known, dtype=dtype, device="cpu", pin_memory=on_gpu).to(device, non_blocking=on_gpu)
    for i, x in enumerate(numbers):
        if isinstance(x, Tensor):
            host[i].copy_(x, non_blocking=True)
    return host


@cache
def tell_once(text: str, name: str) -> None:
    """Once per optimizer: the pause of the first step, say, should not look like a hang."""
    logger.warning(text, name)


def resolve(backend: str, numel: int) -> str:
    """The value of the `backend` option for a step of so many elements: `auto` compiles where it pays."""
    return ("fused" if numel >= AUTO_NUMEL else "loop") if backend == "auto" else backend


def fusable(spec: Spec, weight: Tensor, backend: str) -> bool:
    """Whether a call on tensors like `weight` is compiled."""
    exact = weight.dtype == torch.float64  # scalars travel in fp32
    return backend == "fused" and spec.rule not in _broken and not exact and weight.numel() > 0
