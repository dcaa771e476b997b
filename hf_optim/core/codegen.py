# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The step as machine code: traced once per kind of tensor, cut where a reduction is waited for, compiled by Inductor.

`torch.compile` would do for the code, not for the calls: its guards and wrappers cost tens of microseconds per tensor,
more than the step of a small one. What they check is known here already (`kind`), and the sizes are checked once per
plan (`Program.serves`). The cut serves large tensors: Inductor would store what a reduction and a later line both
need (an update and its norm), as a temporary as large as the weight. Here every stage computes it again from weight,
gradient and state, so that only vectors and scalars pass from one stage to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


VECTOR = 64  # elements: a multiple of every vector register
LARGE = 1 << 18  # elements from which a tensor has stages of its own; below, temporaries stay in the cache
ROWS = 32  # of a block in which a CPU reduces over rows: the next line of memory of each is then near
WIDTHS = 4  # lengths of rows that get code of their own, which is faster; further ones share code for any length
VARIANTS = 12  # kinds of sizes that one step may be compiled for at all
OPTIONS = {"size_asserts": False, "alignment_asserts": False}  # they would be checked for every tensor in every step
LAST = 1 << 30  # behind every level
VIEWS = {"unsqueeze", "view", "expand", "permute", "t", "transpose", "slice", "select", "squeeze", "_unsafe_view"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}  # costly to compute again: their graph is not cut

Traced = Callable[..., list[Tensor]]


@dataclass
class Program:
    """Compiled code, and the condition on the sizes of its arguments that it was compiled under."""

    code: Callable[..., Sequence[Tensor]]
    condition: str | None
    env: ShapeEnv

    def serves(self, args: Sequence[Tensor]) -> bool:
        return self.condition is None or bool(self.env.evaluate_guards_expression(self.condition, args))


@dataclass
class Programs:
    """What has been compiled for one function: a program for each kind of sizes that it met."""

    function: Traced
    owners: Sequence[int]  # which of the tensors stepped together an argument belongs to; -1 for all
    large: bool
    compiled: list[Program] = field(default_factory=list)

    def serving(self, args: list[Tensor]) -> Program:
        """The program for tensors of these sizes; compiled now if there is none."""
        for program in self.compiled:
            if program.serves(args):
                return program
        if len(self.compiled) >= VARIANTS:
            raise RuntimeError(f"more than {VARIANTS} kinds of sizes")
        fixed = len(self.compiled) < WIDTHS
        self.compiled.append(build(self.function, args, self.owners, self.large, fixed))
        return self.compiled[-1]


def build(function: Traced, args: list[Tensor], owners: Sequence[int], large: bool, fixed: bool) -> Program:
    """Trace `function` for any sizes (0 and 1 are constants, and the length of rows if `fixed`) and compile it."""
    env = ShapeEnv(duck_shape=False)  # sizes that happen to be equal now need not be later
    mode = FakeTensorMode(shape_env=env)
    with torch.no_grad():
        fakes = [_fake(mode, x, i, fixed) for i, x in enumerate(args)]
        table = BLOCKED if large and args[0].device.type == "cpu" else {}
        with mode:
            graph = make_fx(function, decomposition_table=table, tracing_mode="symbolic")(*fakes).graph
        graph.eliminate_dead_code()
        if not any(_name(node) in PRODUCTS for node in graph.nodes):
            graph = _without_temporaries(graph, owners)
        with tracing(TracingContext(mode)):
            code = torch._inductor.compile(GraphModule(torch.nn.Module(), graph), fakes, options=OPTIONS)
    return Program(code, env.produce_guards_expression(placeholders=fakes), env)


def _fake(mode: FakeTensorMode, x: Tensor, position: int, fixed: bool) -> Tensor:
    sizes = [DimDynamic.DYNAMIC] * x.ndim
    if fixed and x.ndim > 1 and x.shape[-1] % 16 == 0:
        sizes[-1] = DimDynamic.STATIC  # whole vectors: Inductor's loops would test every one of them for a tail
    context, source = StatelessSymbolicContext(dynamic_sizes=sizes), LocalSource(f"t{position}")
    return mode.from_tensor(x, static_shapes=False, symbolic_context=context, source=source)


def _hint(size: Any) -> int:
    """The number that a size of the traced example has, without making it a condition."""
    return size if isinstance(size, int) else int(size.node.hint)


# ---- reductions over rows, on a CPU ----------------------------------------------------------------------------------


def _in_blocks(reduce: Callable[..., Tensor]) -> Callable[..., Any]:
    """Over the rows of a block, then over blocks: one column after the other, memory would be read in large steps."""

    def decomposed(x: Tensor, dim: Any, keepdim: bool = False, **options: Any) -> Any:
        if x.ndim != 2 or list(dim) != [0] or keepdim or options or x.shape[0] < 2 * ROWS:
            return NotImplemented
        whole = x.shape[0] // ROWS * ROWS
        out = reduce(reduce(x[:whole].unflatten(0, (-1, ROWS)), [1]), [0])
        return out if x.shape[0] % ROWS == 0 else reduce(torch.stack([out, reduce(x[whole:], [0])]), [0])

    return decomposed


def _mean(x: Tensor, dim: Any, keepdim: bool = False, **options: Any) -> Any:
    total = _in_blocks(torch.sum)(x, dim, keepdim, **options)
    return total if total is NotImplemented else total / x.shape[0]


aten = torch.ops.aten
BLOCKED = {
    aten.sum.dim_IntList: _in_blocks(torch.sum),
    aten.amax.default: _in_blocks(torch.amax),
    aten.mean.dim: _mean,
}


# ---- stages ----------------------------------------------------------------------------------------------------------


def _without_temporaries(graph: Graph, owners: Sequence[int]) -> Graph:
    """The same computation, tensor after tensor, with weight-sized values computed anew in every stage.

    What a stage passes on is returned by the graph as well: Inductor stores outputs, and would compute everything
    else again for each entry of the weight.
    """
    output = next(iter(reversed(graph.nodes)))
    new, known = Graph(), dict[Node, Node]()
    owner: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = new.node_copy(node)
            owner[node] = owners[len(owner)]
        else:
            owner[node] = max((owner[x] for x in node.all_input_nodes), default=-1)
    kept: list[Node] = []
    stages = [*_cut(graph, owner), list(output.args[0])]
    for targets in stages:
        copies = dict(known)
        needed = _ancestors(targets, known)
        for node in graph.nodes:
            if node in needed:
                copies[node] = new.node_copy(node, copies.__getitem__)
        known |= {node: copies[node] for node in targets}
        kept += [node for node in targets if _name(node) != "copy_" and targets is not stages[-1]]
    new.output(tuple(known[node] for node in [*output.args[0], *kept]))
    return new


def _ancestors(targets: list[Node], known: Mapping[Node, Any]) -> set[Node]:
    """The nodes to compute for `targets`, from what is known."""
    needed: set[Node] = set()
    pending = list(targets)
    while pending:
        node = pending.pop()
        if node not in needed and node not in known:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def _cut(graph: Graph, owner: Mapping[Node, int]) -> list[list[Node]]:
    """What each stage computes: small values, or (the last stage of a tensor) what is written.

    A level ends where weight-sized values wait for a reduction. Within one, reductions that keep the last axis are a
    stage of their own: they want other loops. What is made of the results belongs to the last stage of their level.
    """
    first = next(iter(graph.nodes))
    level: dict[Node, int] = {}
    reduced: set[Node] = set()
    stages: dict[tuple[int, int], list[list[Node]]] = {}
    for node in _calls(graph):
        sources = node.all_input_nodes
        large = _numel(first) // (ROWS // 2)
        wide = [x for x in sources if _numel(x) >= large]
        waits = bool(wide) or _numel(node) >= large
        level[node] = max((level.get(x, 0) + (waits and x in reduced) for x in sources), default=0)
        if _name(node) == "copy_":
            stages.setdefault((owner[node], LAST), [[], [], []])[2].append(node)
        elif 0 < _numel(node) < large and (wide or not reduced.isdisjoint(sources)):
            reduced.add(node)
            kind = 2 if not wide else 1 if _keeps_last(node, wide[0]) else 0
            if _name(node) not in VIEWS:
                stages.setdefault((owner[node], level[node]), [[], [], []])[kind].append(node)
    parts = [part for _, (one, two, rest) in sorted(stages.items()) for part in _with_rest(one, two, rest)]
    return [[x for x in part if _name(x) == "copy_" or not set(x.users) <= set(part)] for part in parts]


def _with_rest(one: list[Node], two: list[Node], rest: list[Node]) -> list[list[Node]]:
    return [one, two + rest] if one and two else [one + two + rest]


def _calls(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "").split(".")[0]


def _numel(node: Node) -> int:
    """Elements of a tensor, in the traced example; 0 for a size or a list."""
    value = node.meta.get("val")
    return _hint(value.numel()) if isinstance(value, Tensor) else 0


def _keeps_last(node: Node, source: Node) -> bool:
    axes, ndim = node.args[1] if len(node.args) > 1 else None, source.meta["val"].ndim
    return _name(node) == "slice" or (isinstance(axes, list) and not {ndim - 1, -1} & set(axes))
