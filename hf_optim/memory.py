# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a run will need on each device, from one real step of the optimizer on the meta device: shapes without data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import registry
from .core import Optimizer, execute, sharding
from .core.pipeline import Spec
from .verdicts import Layout, decide


LAYOUTS = ("single", "ddp", "fsdp2")
MIXED = ("no", "bf16", "fp16")
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm")}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank while the optimizer steps.

    Activations (and the 16-bit copies of weights that autocast makes) are not among them: they depend on the batch and
    are gone by then, as are the whole layers that FSDP2 gathers. Nor is what driver, libraries and allocator keep.

    Args:
        weights (`int`): parameters, in the dtype they are kept in, and buffers of the model.
        gradients (`int`):
            All of them, or with `gradient_release` those that exist at the same time: of a tied weight three, as
            autograd adds the gradients of its two uses up in a third.
        buckets (`int`): DDP's copies of the gradients, which it sends.
        state (`int`): of the optimizer.
        temporaries (`int`): the most that the step itself holds at a time.
    """

    name: str
    weights: int
    gradients: int
    buckets: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.buckets + self.state + self.temporaries

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Run:
    """How the model is spread, and what that makes of a parameter."""

    layout: str
    world: int
    rank: int
    mixed_precision: str

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.mixed_precision not in MIXED:
            raise ValueError(f"`mixed_precision` must be one of {', '.join(MIXED)}, got {self.mixed_precision!r}")
        if self.world < 1:
            raise ValueError(f"`world` must be at least 1, got {self.world}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"`rank` must be in [0, {self.world}), got {self.rank}")
        if self.layout == "single" and self.world != 1:
            raise ValueError(f"`world={self.world}` needs `layout='ddp'` or `layout='fsdp2'`")

    def dtype(self, p: Tensor) -> torch.dtype:
        """accelerate keeps what trains in fp32 if FSDP2 computes in less; autocast alone leaves weights as loaded."""
        upcast = self.layout == "fsdp2" and self.mixed_precision != "no" and p.requires_grad
        return torch.float32 if upcast else p.dtype

    def held(self, p: Tensor) -> int:
        """Bytes of a parameter, or of its gradient. FSDP2 pads shards to the same number of rows on every rank."""
        numel = p.numel()
        if self.layout == "fsdp2" and p.ndim and p.shape[0]:
            numel = -(-p.shape[0] // self.world) * (numel // p.shape[0])
        return numel * self.dtype(p).itemsize


def estimate_memory(
    model: torch.nn.Module,
    name: str,
    *,
    layout: str = "single",
    world: int = 1,
    rank: int = 0,
    mixed_precision: str = "no",
    **options: Any,
) -> MemoryEstimate:
    """Predict the memory of training `model` with an optimizer. The model may be on the meta device.

    Args:
        model (`torch.nn.Module`): in the dtype it will be loaded in, with `requires_grad` as in training.
        name (`str`): one of [`list_optimizers`].
        layout (`str`, *optional*, defaults to `"single"`): `"single"`, `"ddp"` or `"fsdp2"`.
        world (`int`, *optional*, defaults to 1): number of ranks.
        rank (`int`, *optional*, defaults to 0): the one to predict; rank 0 has the most under FSDP2.
        mixed_precision (`str`, *optional*, defaults to `"no"`): that of accelerate: `"no"`, `"bf16"` or `"fp16"`.
        options: of the optimizer, as for [`create`]; `gradient_release=True` leaves one gradient at a time.

    Raises:
        `ValueError`, `TypeError`: for an unknown name or option, or an optimizer that cannot be used in this way.
    """
    run = _Run(layout, world, rank, mixed_precision)
    found = registry.info(name)
    options = found.cls.with_preset(found.preset, options)
    verdict = decide(found.cls, options, Layout(layout, fp16=mixed_precision == "fp16"))
    if not verdict.fine:
        raise ValueError(f"{name} cannot be used under {layout}: {verdict.reason}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    release = found.cls.completed(options)["gradient_release"]
    with _imagined(world, rank) if layout == "fsdp2" else nullcontext() as mesh:
        for _ in range(2 if layout == "fsdp2" else 1):  # DTensor rehearses what it has not done before
            optimizer, counts = _stand_ins(found.cls, model, options, run, mesh)
            if release:
                optimizer.release_gradients().remove()  # raises where it cannot be done
            state = _state(optimizer, counts)
            temporaries = _temporaries(optimizer, counts, options.get("backend", "auto"))
    gradients = sum(run.held(p) for p in trained)
    return MemoryEstimate(
        name,
        weights=sum(run.held(p) for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
        gradients=_released(model, run) if release else gradients,
        buckets=gradients if world > 1 and layout == "ddp" else 0,
        state=state,
        temporaries=temporaries,
    )


def _stand_ins(
    cls: type[Optimizer], model: torch.nn.Module, options: dict[str, Any], run: _Run, mesh: Any
) -> tuple[Optimizer, dict[Tensor, int]]:
    """An optimizer of one parameter of each kind, and how many parameters each stands for."""
    groups, rest = registry.param_groups(cls, model, options)
    counts: dict[Tensor, int] = {}
    for group in groups:
        kinds = Counter((p.shape, p.stride(), run.dtype(p)) for p in group["params"])
        group["params"] = []
        for (shape, stride, dtype), count in kinds.items():
            whole = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            p = torch.nn.Parameter(whole if mesh is None else _row_shard(whole, mesh))
            group["params"].append(p)
            counts[p] = count
    return cls(groups, **{**rest, "backend": "loop"}), counts


def _state(optimizer: Optimizer, counts: dict[Tensor, int]) -> int:
    """Bytes of state of all parameters, by that of their stand-ins, which is made on the way."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = optimizer._new_state(p, group)
            buffers = [sharding.local(x) for x in optimizer.state[p].values() if isinstance(x, Tensor)]
            total += counts[p] * sum(x.nbytes for x in buffers)
    return total


def _temporaries(optimizer: Optimizer, counts: dict[Tensor, int], backend: str) -> int:
    """The most that is alive at a time of what a step allocates. Tensors follow one another: the largest decides."""
    loss = torch.zeros((), device="meta") if optimizer.needs_loss else None
    total, peak = sum(p.numel() * count for p, count in counts.items()), 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
            with _Live() as live:
                optimizer.step(loss=loss)
            p.grad = None
            spec, chosen = optimizer.spec(group, p, {}), execute.resolve(backend, total)
            eager = live.products or (spec.sums and sharding.is_sharded(p))
            compiled = execute.fusable(spec, p, chosen) and not eager
            peak = max(peak, _compiled(spec, p, optimizer.state[p]) if compiled else live.peak)
    return peak


def _compiled(spec: Spec, p: Tensor, state: dict[str, Any]) -> int:
    """At most what a compiled step keeps for a parameter.

    An elementwise rule is one pass, and passes on the scales of int8 codes only. Any other rule passes on vectors, and
    the sums of a block of rows each: that was measured (tests/test_memory.py, test_int8.py). Products of matrices stay
    as they are in the loop, and so do whole-model sums of shards.
    """
    p, buffers = sharding.local(p), [sharding.local(x) for x in state.values() if isinstance(x, Tensor)]
    small = sum(x.nbytes for x in buffers if x.numel() < p.numel())
    return 4 * small if spec.elementwise else p.nbytes // 4 + 2 * small


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as something refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.own: set[int] = set()
        self.products = False  # of matrices: calls into libraries, which no compiler fuses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the operations on its shards come next
        out = func(*args, **(kwargs or {}))
        self.products |= func.overloadpacket in PRODUCTS
        known = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            self._add(storage, known)
        return out

    def _add(self, storage: Any, known: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in known and key not in self.own:
            self.own.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.own.remove(key)
        self.now -= size


def _storages(tree: Any) -> Iterator[Any]:
    for x in tree_leaves(tree):
        if isinstance(x, Tensor):
            yield x.untyped_storage()


def _released(model: torch.nn.Module, run: _Run) -> int:
    """Gradients that exist at a time: one; under FSDP2 those of a unit, which arrive in one buffer."""
    sizes: Counter[str] = Counter()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters():
        if p.requires_grad and run.layout == "fsdp2":
            sizes[_unit(model, name)] += run.held(p)
        elif p.requires_grad:
            sizes[name] += run.held(p) * (3 if uses[id(p)] > 1 else 1)
    return max(sizes.values())


def _unit(model: torch.nn.Module, name: str) -> str:
    """The module that accelerate's TRANSFORMER_BASED_WRAP shards a parameter with; "" outside of layers."""
    layers = getattr(model, "_no_split_modules", None) or ()
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:end])
        if type(model.get_submodule(owner)).__name__ in layers:
            return owner
    inputs, outputs = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    weight = getattr(inputs, "weight", None)
    alone = weight is not None and weight is not getattr(outputs, "weight", None)
    return name if alone and model.get_parameter(name) is weight else ""


@contextmanager
def _imagined(world: int, rank: int) -> Iterator[DeviceMesh]:
    """A mesh of this rank and others that are not there: a step on the meta device needs no answers from them."""
    if dist.is_initialized():  # it would take its place
        raise RuntimeError("a process group is running; estimate memory under FSDP2 in a process without one")
    dist.init_process_group("fake", rank=rank, world_size=world)
    try:
        # DTensor remembers by mesh what an operation does on this rank: another rank needs a mesh of its own
        yield init_device_mesh("cpu", (world,), mesh_dim_names=(f"imagined_{rank}",))
    finally:
        dist.destroy_process_group()


def _row_shard(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a tensor on the meta device, as FSDP2 deals them out."""
    return distribute_tensor(x, mesh, [Shard(0) if x.ndim else Replicate()], src_data_rank=None)
