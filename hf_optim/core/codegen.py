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

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.choices import InductorChoices
from torch._inductor.codecache import FxGraphCache
from torch._inductor.codegen.cpp import CppKernel, CppScheduling, CppVecKernel, CppVecOverrides, TilingSelect
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpu_vec_isa import VecISA, pick_vec_isa
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.loop_body import LoopBody
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves

from . import sharding
from .graph import parts, reduce_late, store_small, write_early


REGISTER = 16  # fp32 elements of the widest vector register
VECTOR = 64  # elements in a row of an elementwise tensor, whose shape plays no part
SPAN = 256  # entries, also as bits a whole vector of bf16: rows of any number of spans share code
LARGE = 1 << 18  # elements from which a tensor that is reduced is stepped alone: it fills the cache
AHEAD = 2048  # bytes from what a CPU reads to what it is told to fetch
ROWS = 24  # of a block in which a CPU reduces over rows: the next line of memory of each is then near
WIDTHS = 4  # lengths of rows that get code of their own, which is faster; further ones share code for any length
VARIANTS = 12  # kinds of sizes that one step may be compiled for at all
LAYOUTS = 32  # shapes of sharded tensors that one step may be compiled for: DTensors have fixed sizes
OPTIONS: dict[str, Any] = {
    "size_asserts": False,  # of every tensor in every step
    "alignment_asserts": False,
    "bundled_autotune_remote_cache": False,  # ended by what is not called (`_compile`); nothing is tuned anyway
    "force_pointwise_cat": True,  # of step sizes: a view of the result for each takes longer
    # What is used twice is computed twice, faster than stored. Bounded: Inductor's time doubles with a use of a use.
    "realize_reads_threshold": 8,
    "realize_opcount_threshold": 50,
    "realize_acc_reads_threshold": 12,
    "combo_kernel_max_num_args": 500,
    "deterministic": True,  # replicas must not differ by what a GPU finds fastest: a sum in other blocks is another
}
if hasattr(config, "combo_kernel_max_num_nodes"):  # torch 2.11 takes 8, and does not estimate the memory
    OPTIONS |= {"combo_kernel_max_num_nodes": 16, "combo_kernel_peak_memory_pct_threshold": None}
NARROW = {torch.int8, torch.bfloat16, torch.float16}  # read with scales, residuals and noise
NARROW_OPTIONS = {"realize_reads_threshold": 16, "realize_acc_reads_threshold": 24}
INT8_OPTIONS = NARROW_OPTIONS | {"realize_opcount_threshold": 200}
TAG = Path(__file__).read_text()  # Inductor's key to code on disk has neither `repaired` nor the length of vectors
bitcast, recompute = CppVecOverrides.to_dtype_bitcast, SchedulerNode.recompute_size_and_body
persistent, load_line = InductorChoices.should_use_persistent_reduction, CppVecKernel._get_vec_load_line
mark_mutated, dry_compile = GraphLowering.mark_buffer_mutated, VecISA.check_build
_built: set[str] = set()

# A forked process inherits Inductor's pool without its threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=AsyncCompile.pool.cache_clear)

Code = Callable[[list[Any]], Sequence[Tensor]]  # empties the list of arguments, tensors and numbers of spans


@dataclass
class Program:
    """Compiled code, and the condition on the sizes of its arguments that it was compiled under."""

    code: Code
    condition: str
    env: ShapeEnv
    before: list[tuple[Code, list[sharding.Collective]]]  # parts of the step that end by asking other ranks

    def meet(self, every: list[list[Any]]) -> None:
        """Complete the arguments of several calls by what `code` needs from other ranks."""
        for code, sends in self.before:
            sent = [x for args in every for x in code([*args])[: len(sends)]]
            received = iter(sharding.exchange(sends * len(every), sent))
            for args in every:
                args += islice(received, len(sends))

    def serves(self, args: Sequence[Any]) -> bool:
        return bool(self.env.evaluate_guards_expression(self.condition or "True", args))


@dataclass
class Programs:
    """What has been compiled for one function: a program for each kind of sizes that it met."""

    function: Callable[..., list[Tensor]]
    count: int  # tensors that it steps
    large: bool  # whether they fill the cache
    layout: sharding.Layout | None  # of sharded ones: their sizes are fixed
    compiled: list[Program] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)  # lengths of rows with code of their own
    built: ClassVar[int] = 0  # in this process, of all functions

    def serving(self, args: list[Any]) -> Program:
        """The program for tensors of these sizes; compiled now if there is none."""
        for program in self.compiled:
            if self.layout or program.serves(args):  # strides of a rank's empty shard, say, are not to set it apart
                return program
        if len(self.compiled) >= VARIANTS:
            raise RuntimeError(f"more than {VARIANTS} kinds of sizes")
        if args[0].ndim > 1 and len(self.widths) < WIDTHS and not any(isinstance(x, int) for x in args):
            self.widths.add(args[0].shape[-1])
        with sharding.on_all_or_none(self.layout) as sends:
            program = self._build(args)
            sends += [part for _, part in program.before]
        self.compiled.append(program)
        Programs.built += 1
        return program

    def _build(self, args: list[Any]) -> Program:
        """Trace the function and compile it, for any sizes but those that `_fake` says are fixed."""
        env = ShapeEnv(duck_shape=False)  # sizes that happen to be equal now need not be later
        mode = FakeTensorMode(shape_env=env)
        with torch.no_grad():
            fakes = [self._fake(mode, env, x, LocalSource(f"t{i}")) for i, x in enumerate(args)]
            table = select_decomp_table() | ALWAYS | (BLOCKED if self.large and args[0].is_cpu else {})
            with mode, enable_python_dispatcher():
                graph = make_fx(self.function, decomposition_table=table)(*fakes).graph
            graph.eliminate_dead_code()
            *before, (last, _) = [(_compile(part, mode, self.count), sends) for part, sends in parts(graph)]
        guards = env.produce_guards(fakes, [LocalSource(f"t{i}") for i in range(len(fakes))], ignore_static=False)
        return Program(last, " and ".join(g for g in guards if "storage_offset" not in g), env, before)

    def _fake(self, mode: FakeTensorMode, env: ShapeEnv, x: Any, source: LocalSource) -> Any:
        """What an argument is traced as. Numbers and sizes may differ later, not 0, 1, of DTensors, and `widths`."""
        if isinstance(x, int):
            number = env.create_symbol(x, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
            return env.create_symintnode(number, hint=x, source=source)
        sizes = [DimDynamic.STATIC if self.layout else DimDynamic.DYNAMIC] * x.ndim
        if x.ndim > 1 and x.shape[-1] in self.widths and x.shape[-1] % REGISTER == 0:
            sizes[-1] = DimDynamic.STATIC  # whole vectors: Inductor's loops would test every one of them for a tail
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        x = x.as_strided(x.shape, x.stride(), 0).data  # where storages begin is nothing to the code; views take longer
        return mode.from_tensor(x, static_shapes=False, symbolic_context=context, source=source)


def _compile(graph: Graph, mode: FakeTensorMode, count: int) -> Code:
    reduce_late(graph, count)
    write_early(graph)
    store_small(graph)
    module = GraphModule(torch.nn.Module(), graph)
    inputs = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    dtypes = {x.dtype for x in inputs if isinstance(x, Tensor)}
    key = f"{compiler_config.cache_key_tag} {TAG}"
    with (
        tracing(TracingContext(mode)),
        config.patch(OPTIONS | (INT8_OPTIONS if torch.int8 in dtypes else NARROW_OPTIONS if NARROW & dtypes else {})),
        config.patch(combo_kernels=count > 1),  # on a GPU small tensors share kernels, whose launches take longer
        config.patch(cpp_cache_precompile_headers=Programs.built > 3),  # making them takes as long as several programs
        repaired(dtypes),
        compiler_config.patch(cache_key_tag=f"{key} {inputs[0].is_cpu and pick_vec_isa()}"),  # type: ignore[attr-defined]
    ):
        try:
            made: Any = compile_fx_inner(module, inputs, is_inference=True)
        except Exception as error:  # a compiler that was killed leaves part of a file, to be loaded ever after
            part = getattr(getattr(error, "inner_exception", error), "path", None)
            if part is None or not Path(part).is_relative_to(cache_dir()):
                raise  # a module that lacks a name has a path, too
            Path(part).unlink(missing_ok=True)
            made = compile_fx_inner(module, inputs, is_inference=True)
    return getattr(made, "current_callable", made)  # what calls it looks for profilers every time


# ---- Inductor, where its code for CPUs falls short -----------------------------------------------------------------


def _in_blocks(reduce: Callable[..., Tensor]) -> Callable[..., Any]:
    """Over the rows of a block, then over blocks: one column after the other, memory would be read in large steps."""

    def decomposed(x: Tensor, dim: Any, keepdim: bool = False, **options: Any) -> Any:
        if x.ndim < 2 or list(dim) != [0] or keepdim or options or x.shape[0] < 2 * ROWS:
            return NotImplemented
        whole = (x.shape[0] // ROWS - 1) * ROWS  # some are always left: for none or one there would be other code
        blocks = reduce(x[:whole].unflatten(0, (-1, ROWS)), [1])
        out = reduce(blocks.unsqueeze(0), [1])  # as they are: code in more steps would be code for fewer sizes
        return reduce(torch.cat([out, reduce(x[whole:].unsqueeze(0), [1])]), [0])

    return decomposed


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Any:
    """torch chooses between two formulas by the weight: where that is a tensor for every entry, in every step."""
    if isinstance(weight, float) and abs(weight) >= 0.5:
        return end - (1 - weight) * (end - start)
    return NotImplemented if getattr(weight, "ndim", 0) else start + weight * (end - start)


def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> str:
    """Read 32 bits of a vector as another type where they are. Inductor goes through memory, one by one: stochastic
    rounding would take half as long again. Of a scalar, Inductor asks for the function by this name."""
    if {dtype, src_dtype} != {torch.float32, torch.int32}:
        return bitcast(x, dtype, src_dtype)
    return f"[&]{{ {V.kernel._get_vec_type(dtype)} y; std::memcpy((void*)&y, &{x}, sizeof(y)); return y; }}()"


def _fetched(kernel: Any, var: str, index: Any, dtype: torch.dtype, *args: Any) -> str:
    """Tell the CPU what will be read soon: alone it follows few streams, each to the end of its page."""
    line = load_line(kernel, var, index, dtype, *args)
    if index == 0 or os.name == "nt":  # a buffer of the loop; another compiler
        return line
    stride = index.coeff(kernel.itervars[-1])  # a long one leads to the next row: of many, so much would fill L1
    ahead = AHEAD // dtype.itemsize // (1 if stride.is_number and stride < SPAN else 4)
    return f"[&]{{ __builtin_prefetch({var} + {cexpr_index(index)} + {ahead}); return {line}; }}()"


def _in_parts(kernel: Any, kind: str, dtype: torch.dtype, use_scalar: bool) -> bool:
    """Whether a sum is made of partial ones, for its precision: that of a tensor. Inductor goes by the size now: other
    code for up to 4096, and for 16 tensors other code for every choice of small ones among them."""
    return kind == "welford_reduce" or (kind == "sum" and dtype == torch.float and kernel.reduction_depth == 0)


def _counted(kernel: Any, start: Any, stride: Any) -> Any:
    """Numbers from `start` on, by one addition. Inductor puts every one of them in its place in every vector."""
    vector = kernel._get_vec_type(start.dtype)
    code = f"{vector}({start}) + {vector}({stride}) * {vector}::arange(0, 1)"  # a multiple of a large stride wraps
    new = kernel.cse.generate(kernel.compute, code, dtype=start.dtype)
    new.is_vec = True
    return new


def _written_first(node: Any, *args: Any, **kwargs: Any) -> None:
    """Keep new state ahead of what reads it and behind what reads the old, also where Inductor gives a loop the shape
    of another to fuse them: it then forgets the writes before what the loop reads, and (2.11) the reads before its."""
    before = node.read_writes
    recompute(node, *args, **kwargs)
    node.read_writes = before
    node.refresh_dependencies(normalize=True, need_clear_tiling_cache=False)


def _read_again(lowering: Any, name: str) -> None:
    """Store what was computed from a buffer that is now written only if used later: Inductor stores all of it."""
    alive = {id(x) for x in tree_leaves([*lowering.env.values()])}
    lowering.name_to_users[name] = [x for x in lowering.name_to_users[name] if id(x) in alive]
    mark_mutated(lowering, name)


def _sizes_of(inputs: Sequence[Any]) -> list[torch.SymInt]:
    """The sizes that code was written for: conditions on them are kept with it on disk. Inductor knows sizes that are
    inputs (as in other threads): without ours, code with 32-bit indices, say, would serve tensors of any size."""
    return [*{str(n): n for x in inputs for n in getattr(x, "shape", (x,)) if isinstance(n, torch.SymInt)}.values()]


def _built_before(isa: Any, code: str) -> bool:
    """What builds for wide vectors builds for narrower ones, but Inductor tries them all, each with large headers
    that it does not need. Here the compiler has to know their flags; where torch lacks them, the loop takes over."""
    if code not in _built and dry_compile(isa, ""):
        _built.add(code)
    return code in _built


@contextmanager
def repaired(dtypes: set[torch.dtype]) -> Iterator[None]:
    """Inductor with the replacements above and below, while it compiles a graph with inputs of these types."""
    select_tiling, priority = TilingSelect.select_tiling, CppScheduling.get_fusion_pair_priority
    halves = [x for x in dtypes if x.itemsize == 2]

    def whole_vectors(*args: Any) -> Any:
        """Take as many entries at a time as a vector of the narrowest float has. Inductor takes as many as are in a
        vector of fp32, half of one of bf16, whose load waits for the store before it: they seem to overlap."""
        factors, *rest = select_tiling(*args)
        return [pick_vec_isa().nelements(halves[0])] if halves and len(factors) == 1 else factors, *rest

    def rows_first(backend: Any, a: Any, b: Any) -> int:
        """Fuse loops over rows, then flat ones to them: fused to each other these would stay apart, and what both read
        (the new weight, which Kahan's rounding writes in two parts) would be stored."""
        simple = all(isinstance(x, SchedulerNode) and not x.is_reduction() for y in (a, b) for x in y.get_nodes())
        loops = [len(x.group[1][0]) for x in (a, b)] if simple and NARROW & dtypes else [0]
        return priority(backend, a, b) - (sum(loops) if max(loops) > 1 else 0)

    def of_known_length(features: Any, cooperative_reduction: bool) -> bool:
        """Keep an axis in registers if its length is fixed: else kernels of several tensors cannot."""
        return features.reduction_numel.is_number and persistent(features, cooperative_reduction)

    with (
        patch.object(InductorChoices, "should_use_persistent_reduction", staticmethod(of_known_length)),
        patch.object(CppVecOverrides, "to_dtype_bitcast", staticmethod(to_dtype_bitcast)),
        patch.object(CppVecKernel, "arange", _counted),
        patch.object(CppKernel, "need_use_acc_helper", _in_parts),
        patch.object(CppVecKernel, "_get_vec_load_line", _fetched),
        patch.object(SchedulerNode, "recompute_size_and_body", _written_first),
        patch.object(VecISA, "check_build", _built_before),
        patch.object(FxGraphCache, "_filter_backed_symints", staticmethod(_sizes_of)),
        patch.object(GraphLowering, "mark_buffer_mutated", _read_again),
        # What was written in place has another name: no error (pytorch#196570), it cannot be kept for one loop anyway.
        patch.object(LoopBody, "get_read_expr", lambda body, name: next(iter(body.get_all_read_expr(name)), None)),
        patch.object(TilingSelect, "select_tiling", whole_vectors),
        patch.object(CppScheduling, "get_fusion_pair_priority", rows_first),
    ):
        yield


aten = torch.ops.aten
ALWAYS: dict[Any, Callable[..., Any]] = {aten.lerp.Tensor: _lerp, aten.lerp.Scalar: _lerp}
BLOCKED: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _in_blocks(torch.sum),
    aten.amax.default: _in_blocks(torch.amax),
}
