# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The step as machine code: traced once per kind of tensor, and compiled by Inductor.

`torch.compile` would do for the code, not for the calls: its guards and wrappers cost tens of microseconds per tensor,
more than the step of a small one. What they check is known here already (`plan.kind`), and sizes are checked once per
plan (`Program.serves`). Nor would it do for memory: what a reduction and a later line both need (an update, and its
norm) it stores, a temporary as large as the weight. Here it is computed twice, from weight, gradient and new state,
unless it is a long computation (`OPTIONS`): many flags at once may still store one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.codegen.cpp import CppVecOverrides
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .graph import reduce_late, store_small, write_early


REGISTER = 16  # fp32 elements of the widest vector register
VECTOR = 64  # elements in a row of an elementwise tensor, whose shape plays no part
LARGE = 1 << 18  # elements from which a tensor that is reduced is stepped alone: it fills the cache
ROWS = 24  # of a block in which a CPU reduces over rows: the next line of memory of each is then near
WIDTHS = 4  # lengths of rows that get code of their own, which is faster; further ones share code for any length
VARIANTS = 12  # kinds of sizes that one step may be compiled for at all
OPTIONS = {
    "size_asserts": False,  # of every tensor in every step
    "alignment_asserts": False,
    # What is used twice is computed twice: it takes less time than storing it, and no memory. Not without a bound:
    # Inductor's own time doubles with every use of a use.
    "realize_reads_threshold": 8,
    "realize_opcount_threshold": 50,
    "realize_acc_reads_threshold": 12,
}

Traced = Callable[..., list[Tensor]]


@dataclass
class Program:
    """Compiled code, and the condition on the sizes of its arguments that it was compiled under."""

    code: Callable[[list[Tensor]], Sequence[Tensor]]  # empties the list of arguments
    condition: str
    env: ShapeEnv

    def serves(self, args: Sequence[Tensor]) -> bool:
        return bool(self.env.evaluate_guards_expression(self.condition or "True", args))


@dataclass
class Programs:
    """What has been compiled for one function: a program for each kind of sizes that it met."""

    function: Traced
    count: int  # tensors that it steps
    large: bool  # whether they fill the cache
    compiled: list[Program] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)  # lengths of rows with code of their own
    built: ClassVar[int] = 0  # in this process, of all functions: what a benchmark reports

    def serving(self, args: list[Tensor]) -> Program:
        """The program for tensors of these sizes; compiled now if there is none."""
        for program in self.compiled:
            if program.serves(args):
                return program
        if len(self.compiled) >= VARIANTS:
            raise RuntimeError(f"more than {VARIANTS} kinds of sizes")
        if args[0].ndim > 1 and len(self.widths) < WIDTHS:
            self.widths.add(args[0].shape[-1])
        fixed = args[0].ndim > 1 and args[0].shape[-1] in self.widths
        self.compiled.append(build(self.function, args, self.count, self.large, fixed))
        Programs.built += 1
        return self.compiled[-1]


def build(function: Traced, args: list[Tensor], count: int, large: bool, fixed: bool) -> Program:
    """Trace `function`, the step of `count` tensors, for any sizes (0 and 1 are constants, and the length of rows if
    `fixed`) and compile it."""
    env = ShapeEnv(duck_shape=False)  # sizes that happen to be equal now need not be later
    mode = FakeTensorMode(shape_env=env)
    with torch.no_grad():
        fakes: list[Any] = [_fake(mode, x, i, fixed) for i, x in enumerate(args)]
        table = select_decomp_table() | ALWAYS | (BLOCKED if large and args[0].device.type == "cpu" else {})
        with mode:
            graph = make_fx(function, decomposition_table=table, tracing_mode="symbolic")(*fakes).graph
        graph.eliminate_dead_code()
        reduce_late(graph, count)
        write_early(graph)
        store_small(graph)
        module = GraphModule(torch.nn.Module(), graph)
        with tracing(TracingContext(mode)), config.patch(OPTIONS), bits_in_registers():
            code = compile_fx_inner(module, list(fakes), is_inference=True)
    sources: list[Any] = [LocalSource(f"t{i}") for i in range(len(fakes))]
    guards = env.produce_guards(fakes, sources, ignore_static=False)
    return Program(code, " and ".join(g for g in guards if "storage_offset" not in g), env)


def _fake(mode: FakeTensorMode, x: Tensor, position: int, fixed: bool) -> Tensor:
    sizes = [DimDynamic.DYNAMIC] * x.ndim
    if fixed and x.ndim > 1 and x.shape[-1] % REGISTER == 0:
        sizes[-1] = DimDynamic.STATIC  # whole vectors: Inductor's loops would test every one of them for a tail
    x = x.as_strided(x.shape, x.stride(), 0)  # where in its storage a tensor begins is nothing to the code
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(x, static_shapes=False, symbolic_context=context, source=LocalSource(f"t{position}"))


# ---- reductions over rows, on a CPU --------------------------------------------------------------------------------


def _in_blocks(reduce: Callable[..., Tensor]) -> Callable[..., Any]:
    """Over the rows of a block, then over blocks: one column after the other, memory would be read in large steps."""

    inside = False  # blocks are reduced as they are: code in more steps would be code for fewer sizes

    def decomposed(x: Tensor, dim: Any, keepdim: bool = False, **options: Any) -> Any:
        nonlocal inside
        if inside or x.ndim < 2 or list(dim) != [0] or keepdim or options or x.shape[0] < 2 * ROWS:
            return NotImplemented
        inside, whole = True, x.shape[0] // ROWS * ROWS
        try:
            out = reduce(reduce(x[:whole].unflatten(0, (-1, ROWS)), [1]), [0])
            return out if x.shape[0] % ROWS == 0 else reduce(torch.stack([out, reduce(x[whole:], [0])]), [0])
        finally:
            inside = False

    return decomposed


def _mean(x: Tensor, dim: Any, keepdim: bool = False, **options: Any) -> Any:
    total = _in_blocks(torch.sum)(x, dim, keepdim, **options)
    return total if total is NotImplemented else total / x.shape[0]


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Any:
    """torch chooses between two formulas by the weight, which here is unknown: for every entry, in every step."""
    return NotImplemented if weight.ndim else start + weight * (end - start)


def _sign(x: Tensor) -> Any:
    """By its bits: Inductor makes two comparisons and two choices of it. NaN has the sign that it carries, not 0."""
    if x.dtype != torch.float32:
        return NotImplemented
    bits = x.view(torch.int32)
    nonzero = -(bits & 0x7FFFFFFF) >> 31  # all ones, or 0
    return ((bits & -0x80000000 | 0x3F800000) & nonzero).view(torch.float32)


@contextmanager
def bits_in_registers() -> Iterator[None]:
    """Read 32 bits of a vector as another type where they are. Inductor goes through memory, one by one: stochastic
    rounding would take half as long again."""
    real = CppVecOverrides.to_dtype_bitcast

    def bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> str:
        if {dtype, src_dtype} != {torch.float32, torch.int32}:
            return real(x, dtype, src_dtype)
        return f"[&]{{ {V.kernel._get_vec_type(dtype)} y; std::memcpy((void*)&y, &{x}, sizeof(y)); return y; }}()"

    with patch.object(CppVecOverrides, "to_dtype_bitcast", staticmethod(bitcast)):
        yield


aten = torch.ops.aten
ALWAYS: dict[Any, Callable[..., Any]] = {aten.lerp.Tensor: _lerp, aten.sign.default: _sign}
BLOCKED: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _in_blocks(torch.sum),
    aten.amax.default: _in_blocks(torch.amax),
    aten.mean.dim: _mean,
}
