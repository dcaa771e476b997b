# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The traced step in the order that Inductor needs: it decides what is read once, what is stored and what is fused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node


VIEWS = {"unsqueeze", "squeeze", "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select"}
VIEWS |= {"unbind", "getitem", "alias", "detach"}


def reduce_late(graph: Graph, count: int) -> None:
    """Move the reductions of each of `count` tensors, and what waits for them, behind everything else of its step.

    Inductor puts a reduction into an earlier loop over the same weight, but not that loop into the reduction's. A
    buffer that is still to be read by a reduction is written last: to write it, Inductor stores all that was read.
    """
    late, read_late = set[Node](), set[Node]()
    for node in graph.nodes:
        if _is_reduction(node) or any(x in late for x in node.all_input_nodes):
            late.add(node)
    for node in reversed(graph.nodes):
        if any(x in late or (x in read_late and not _is_write(x)) for x in node.users):
            read_late.add(node)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    writes = [node for node in nodes if _is_write(node)]
    late |= {node for node in writes if node.args[0] in read_late}
    ends = set(writes[len(writes) // count - 1 :: len(writes) // count])  # tensor after tensor was traced
    own: list[Node] = []
    for node in nodes:
        own += [node] if node in late else []
        if node in ends:
            for x in own:
                node.append(x)
                node = x
            own = []


def write_early(graph: Graph) -> None:
    """Write new state where it is computed, and let what follows read it there.

    A step has one more loop over the weight than it has reductions that wait for each other: every one of them would
    compute the new state from the old.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    for write in filter(_is_write, nodes):
        buffer, value = write.args
        own, new = buffer.meta["val"], value.meta["val"]
        same = own.dtype == new.dtype and own.ndim == new.ndim and _numel(buffer) == _numel(value)
        if same and _is_made(value) and all(place[x] <= place[value] for x in _past(buffer, value) - {write}):
            later = [user for user in value.users if user is not write]
            value.append(write)
            for user in later:
                user.replace_input_with(value, write)


def _past(start: Node, end: Node) -> set[Node]:
    """All nodes that a value gets to without going through `end`."""
    found, waiting = set[Node](), [start]
    while waiting:
        fresh = {user for user in waiting.pop().users if user is not end} - found
        found |= fresh
        waiting += fresh
    return found


def store_small(graph: Graph) -> None:
    """Return the vectors and scalars that weight-sized computations read.

    Inductor stores outputs; anything else elementwise it computes again for every entry of the weight.
    """
    output = next(iter(reversed(graph.nodes)))
    passed = [
        node for node in graph.nodes if _is_made(node) and any(_numel(x) > 8 * _numel(node) for x in _readers(node))
    ]
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
    return _hint(value.numel()) if isinstance(value, Tensor) else 0


def _hint(size: Any) -> int:
    """The number that a size of the traced example has, without making it a condition."""
    return size if isinstance(size, int) else int(size.node.hint)
