# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Compiled steps of shards: the numbers of the loop, with one collective where the loop has one for every tensor."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import fill_grads, make_params, slow_but
from engine import BF16, as_compiled, flags_on
from ranks import launch
from test_sharding import (
    FACTORED,
    MORE_SHAPES,
    NEEDS_LOSS,
    SHAPES,
    compare,
    few,
    make_model,
    many,
    place,
    run_both,
    sharded_model,
    train,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import hf_optim
from hf_optim.core import codegen, execute


ALIKE = torch.__version__ >= (2, 13)  # torch 2.11 traces an empty shard in another order: all ranks take the loop


def trace_only():
    """On this rank, run traced graphs as they are. Returns the list that they are added to."""
    graphs = []

    def compile_(graph, inputs, is_inference):
        graphs.append(graph)
        return as_compiled(graph)

    codegen.compile_fx_inner = compile_
    return graphs


def compiled_equals_whole(name, variants, shapes, placements=None, all_compile=True):
    graphs, found = trace_only(), []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for options, dtype in variants:
        runs = run_both(name, options, dtype, mesh, placements, shapes, backend="fused")
        found += compare(f"{name} {options} {dtype}", *runs, exact=False)
    assert graphs and not (ALIKE and all_compile and execute._broken) and not found, "\n".join(found)


@pytest.mark.parametrize("which", slow_but("smmf", "adafactor_corrected", "lamb", "muon"))
def test_compiled_steps_of_shards_equal_whole_ones(which):
    launch(2, compiled_equals_whole, which, few(which) + [({"precision": "kahan"}, BF16)], SHAPES)


@pytest.mark.slow
def test_compiled_steps_on_three_ranks(name):
    # Muon's part of a sum of an empty shard needs no gathered matrix: other collectives, and the loop takes over
    launch(3, compiled_equals_whole, name, few(name), MORE_SHAPES, None, name != "muon")


@pytest.mark.slow
def test_compiled_steps_with_every_option(name):
    launch(2, compiled_equals_whole, name, many(name), SHAPES)


@pytest.mark.slow
def test_compiled_steps_of_shards_of_the_second_axis(name):
    variants = [({}, torch.float32), (flags_on(name), torch.float32)]
    launch(2, compiled_equals_whole, name, variants, ((5, 4), (3, 6), (2, 1)), [Shard(1)])


def on_two_axes():
    graphs, mesh = trace_only(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        runs = run_both("smmf", {}, torch.float32, mesh, placements, ((5, 4), (7,), (2, 2, 2)), backend="fused")
        found = compare(f"{placements}", *runs, exact=False)
        assert graphs and not execute._broken and not found, "\n".join(found)


def test_compiled_steps_on_meshes_of_two_dimensions():
    launch(4, on_two_axes)


def fsdp(name, options):
    whole, model = make_model(), sharded_model()
    one = hf_optim.create(name, whole, backend="loop", **options)
    two = hf_optim.create(name, model, backend="fused", **options)
    train(whole, one, 1, 3), train(model, two, 1, 3)
    far = max((p - q.full_tensor()).abs().max().item() for p, q in zip(whole.parameters(), model.parameters()))
    assert far < 2e-6 and not execute._broken


@pytest.mark.parametrize("flags", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", slow_but("sm3"))
def test_fsdp2_with_generated_code(which, flags):
    launch(2, fsdp, which, flags_on(which) if flags else {})


def test_a_loop_of_another_shape_waits_for_the_state_that_it_reads():
    launch(2, fsdp, "fractional_adamw", {"centralize": True, "cautious": True})


def released(name):
    graphs = trace_only()
    whole, model = make_model(), sharded_model()
    one, two = hf_optim.create(name, whole, backend="loop"), hf_optim.create(name, model, backend="fused")
    two.release_gradients()
    train(whole, one, 1, 3), train(model, two, 1, 3)
    far = max((p - q.full_tensor()).abs().max().item() for p, q in zip(whole.parameters(), model.parameters()))
    assert graphs and far < 2e-6 and not (ALIKE and execute._broken)


@pytest.mark.parametrize("which", ["adafactor_corrected", "smmf"])
def test_released_gradients_of_shards_are_stepped_by_compiled_code(which):
    launch(2, released, which)


# ---- collectives ---------------------------------------------------------------------------------------------------


def joined(name):
    trace_only()
    mesh, counts = init_device_mesh("cpu", (2,)), {}
    shapes = [(65, 48)] * 6
    for backend in ("loop", "fused"):
        params = [torch.nn.Parameter(place(p, mesh)) for p in make_params(shapes)]
        optimizer = hf_optim.create(name, params, backend=backend)
        for t in (1, 2):
            for p, g in zip(params, fill_grads(make_params(shapes), seed=t)):
                p.grad = place(g, mesh)
            with CommDebugMode() as mode:
                optimizer.step(loss=1.0 if optimizer.needs_loss else None)
        counts[backend] = mode.get_total_counts() - (name in NEEDS_LOSS)
    info = hf_optim.info(name)
    of_model = 2 if optimizer.all_sums(optimizer.param_groups[0]) else 0  # sums over all weights are one for them all
    if name == "muon":  # whole matrices, one at a time
        assert counts["fused"] == counts["loop"] == len(shapes)
    elif info.cls.elementwise and all(t.elementwise for t in info.techniques):
        assert counts["fused"] == counts["loop"] <= of_model
    else:
        assert counts["fused"] <= counts["loop"] / len(shapes) + of_model, counts
    if name in FACTORED:
        assert counts["fused"] <= 2, counts


def test_one_collective_serves_all_tensors_of_a_shape(second_name):
    launch(2, joined, second_name)


def one_rank_fails(name):
    graphs = trace_only()
    if dist.get_rank() == 1:
        codegen.compile_fx_inner = lambda *args, **kwargs: 1 / 0
    mesh = init_device_mesh("cpu", (2,))
    found = compare(name, *run_both(name, {}, torch.float32, mesh, backend="fused"), exact=False)
    assert execute._broken and not found, "\n".join(found)
    assert bool(graphs) == (dist.get_rank() == 0)


def test_where_one_rank_cannot_compile_all_take_the_loop():
    launch(2, one_rank_fails, "smmf")


def ranks_differ(name):
    trace_only()
    if dist.get_rank() == 1:
        real = codegen.parts
        codegen.parts = lambda graph: ((p, [replace(c, numel=c.numel + 1) for c in sends]) for p, sends in real(graph))
    mesh = init_device_mesh("cpu", (2,))
    found = compare(name, *run_both(name, {}, torch.float32, mesh, backend="fused"), exact=False)
    assert execute._broken and not found, "\n".join(found)


def test_where_ranks_would_send_different_things_all_take_the_loop():
    launch(2, ranks_differ, "smmf")


def many_shapes():
    trace_only()
    codegen.LAYOUTS = 2
    mesh = init_device_mesh("cpu", (2,))
    shapes = ((6, 4), (8, 4), (10, 4))
    found = compare("many", *run_both("sm3", {}, torch.float32, mesh, shapes=shapes, backend="fused"), exact=False)
    assert execute._broken and not found, "\n".join(found)


def test_many_shapes_of_shards_are_left_to_the_loop():
    launch(2, many_shapes)
