# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The traced step in the order that Inductor needs: it decides what is read once, what is stored and what is fused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .sharding import Collective


VIEWS = {"unsqueeze", "squeeze", "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select"}
VIEWS |= {"unbind", "getitem", "alias", "detach"}
COLLECTIVES = {"_c10d_functional", "_dtensor"}


def parts(graph: Graph) -> Iterator[tuple[Graph, list[Collective]]]:
    """The graph of one tensor cut at its collectives: parts that end with what other ranks are sent, then the rest.

    Every part has the arguments of the whole, and all that was received before it. What else it needs of earlier
    parts, it computes again: nothing as large as the weight has to wait for other ranks.
    """
    depth: dict[Node, int] = {}  # collectives on the way to a node
    for node in graph.nodes:
        depth[node] = max((depth[x] for x in node.all_input_nodes), default=0) + _is_collective(node)
    last = max(depth.values())
    levels = [[n for n in graph.nodes if _is_collective(n) and depth[n] == k] for k in range(1, last + 1)]
    for k in range(last + 1):
        part, copies = Graph(), dict[Node, Node]()
        received = [_arrival(n) for level in levels[:k] for n in level]
        for node in [n for n in graph.nodes if n.op == "placeholder"] + received:
            copies[node] = part.placeholder(node.name)
            copies[node].meta = node.meta
        for node in graph.nodes:
            ours = k == last or not (_is_write(node) or node.op == "output")
            if ours and node not in copies and depth[node] <= k and not _is_collective(node):
                copies[node] = part.node_copy(node, copies.__getitem__)
        if k < last:
            part.output(tuple(copies[n.args[0]] for n in levels[k]))
        part.eliminate_dead_code()
        yield part, [Collective(n.target, n.args[1:], _numel(n.args[0])) for n in levels[k]] if k < last else []


def _is_collective(node: Node) -> bool:
    return getattr(node.target, "namespace", "") in COLLECTIVES and _name(node) != "wait_tensor"


def _arrival(collective: Node) -> Node:
    user = next(iter(collective.users))
    return user if _name(user) == "wait_tensor" else collective


def reduce_late(graph: Graph, count: int) -> None:
    """Move the reductions of each of `count` tensors, and what waits for them, behind everything else of its step.

    Inductor puts a reduction into an earlier loop over the same weight, but not that loop into the reduction's. A
    buffer that is still to be read by a reduction is written last, then vectors: Inductor stores first what read them.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    writes = [node for node in nodes if _is_write(node)]
    if not writes:
        return
    late, read_late = set[Node](), set[Node]()
    for node in graph.nodes:
        if _is_reduction(node) or any(x in late for x in node.all_input_nodes):
            late.add(node)
    for node in reversed(graph.nodes):
        if any(x in late or (x in read_late and not _is_write(x)) for x in node.users):
            read_late.add(node)
    late |= {node for node in writes if node.args[0] in read_late}
    ends = set(writes[len(writes) // count - 1 :: len(writes) // count])  # tensor after tensor was traced
    own, whole = list[Node](), max(map(_numel, writes))
    for node in nodes:
        own += [node] if node in late else []
        if node in ends:
            own.sort(key=lambda x: _is_write(x) and 8 * _numel(x) < whole)
            for x in own:
                node.append(x)
                node = x
            own = []


def write_early(graph: Graph) -> None:
    """Write new state where it is computed, and let what follows read it there.

    A step has one more loop over the weight than it has reductions that wait for each other: every one of them would
    compute the new state from the old. State that no reduction needs waits for the last loop, which reads all of it.
    """
    nodes, needed = list(graph.nodes), set[Node]()
    place = {node: i for i, node in enumerate(nodes)}
    for node in reversed(nodes):
        if node in needed or _is_reduction(node):
            needed |= {node, *node.all_input_nodes}
    for write in (node for node in nodes if _is_write(node) and (node.args[1] in needed or not needed)):
        buffer, value = write.args
        own, new = buffer.meta["val"], value.meta["val"]
        same = own.dtype == new.dtype and own.ndim == new.ndim and _numel(buffer) == _numel(value)
        if same and _is_made(value) and all(place[x] <= place[value] for x in _past(buffer, value) - {write}):
            later = [user for user in value.users if user is not write]
            value.append(write)
            for user in later:
                user.replace_input_with(value, write)


def _past(start: Node, end: Node) -> set[Node]:
    """All nodes that a value, not only its size, gets to without going through `end`."""
    found, waiting = set[Node](), [start]
    while waiting:
        fresh = {user for user in waiting.pop().users if user is not end and _name(user) != "sym_size"} - found
        found |= fresh
        waiting += fresh
    return found


def store_small(graph: Graph) -> None:
    """Return the vectors and scalars that weight-sized computations read.

    Inductor stores outputs; anything else elementwise it computes again for every entry of the weight.
    """
    output = next(iter(reversed(graph.nodes)))
    passed = [n for n in graph.nodes if _is_made(n) and any(_numel(x) > 8 * _numel(n) for x in _readers(n))]
    passed = [n for n in passed if _numel(n) > 1 or _is_reduction(n) or not n.meta["val"].is_cuda]  # each a launch
    output.args = (tuple([*output.args[0], *passed]),)


def _is_made(node: Node) -> bool:
    """Whether it is a tensor that was computed from others, and not just seen in another shape."""
    return node.op == "call_function" and _numel(node) > 0 and _name(node) not in VIEWS and bool(node.all_input_nodes)


def _is_write(node: Node) -> bool:
    return node.target is torch.ops.aten.copy_.default


def _is_reduction(node: Node) -> bool:
    return _is_made(node) and any(_numel(x) > 8 * _numel(node) for x in node.all_input_nodes)


def _readers(node: Node) -> Iterator[Node]:
    """The nodes that compute with a tensor, also in another shape."""
    for user in node.users:
        if _name(user) in VIEWS:
            yield from _readers(user)
        else:
            yield user


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "").split(".")[0]


def _numel(node: Node) -> int:
    """Elements of a tensor, in the traced example; 0 for a size or a list."""
    value = node.meta.get("val")
    size: Any = value.numel() if isinstance(value, Tensor) else 0
    return size if isinstance(size, int) else int(size.node.hint)  # asked for itself, a symbol becomes a condition
