# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The fused backend: few graphs, none later, the numbers of the loop, and the loop where a compiler fails.

Most tests run the traced graphs as they are: that is where graphs are counted, and it takes a second where code
generation takes ten.
"""

import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import advance, fill_grads, loss_at, make_params, slow_but
from engine import BF16, as_compiled, bits, brisk, build, everything, flags_on, frozen, moments, rich
from ranks import launch
from torch._dynamo.utils import counters
from torch._inductor import config, cpu_vec_isa
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.cpu_vec_isa import VecAMX, VecAVX2, VecAVX512
from torch._inductor.output_code import OutputCode
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import fresh_cache, run_and_get_code

import hf_optim
from hf_optim.core import codegen, execute, plan


# With chunks of three, or of two: full chunks and a single tensor of each rank; a scalar, sizes of one, nothing.
# Code for whole shapes may compare sizes (which axis is longer, whether signs fill their bytes): OTHER is like that.
MODEL = (*[(9, 10)] * 4, *((5 + i,) for i in range(7)), (), (1,), (1, 10), (5, 3, 4), (0, 3), (12, 10))
OTHER = (*[(10, 11)] * 4, *((11 + i,) for i in range(7)), (), (1,), (1, 11), (7, 3, 5), (2, 0), (31, 11))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs traced so far, in a process that seems to have compiled nothing yet."""
    traced = []

    def compile_(graph, inputs, is_inference):
        traced.append(graph)
        return as_compiled(graph)

    monkeypatch.setattr(codegen, "compile_fx_inner", compile_)
    monkeypatch.setattr(execute, "_broken", set())
    monkeypatch.setattr(execute, "CHUNK", 3)
    fresh()
    yield traced
    fresh()


def fresh():
    execute.programs.cache_clear()


def far(params, others):
    return max(((p - q).abs().max() / (1 + q.abs().max())).item() for p, q in zip(params, others) if p.numel())


@pytest.mark.parametrize("which", slow_but("adamw", "adafactor_corrected", "adalo"))
def test_fused_steps_are_the_steps_of_the_loop(which, graphs):
    options = {**brisk(which), **flags_on(which)}
    one, params = build(which, MODEL, backend="loop", **options)
    two, theirs = build(which, MODEL, backend="fused", **options)
    advance(one, params, 2)
    assert not graphs
    advance(two, theirs, 2)
    assert graphs and far(theirs, params) < 2e-6
    assert [two.state[p]["step"] for p in theirs] == [one.state[p]["step"] for p in params]


@pytest.mark.parametrize("which", slow_but("adamw", "adafactor_corrected"))
def test_few_graphs_and_none_later(which, graphs):
    optimizer, params = build(which, MODEL, backend="fused", **moments(which))
    advance(optimizer, params, 1)
    first = len(graphs)
    # elementwise: a chunk and a single one of flat tensors, () and (1,); else by rank and axes of one element too
    assert first <= (4 if optimizer._plan.calls[0].spec.elementwise else 10)
    advance(optimizer, params, 2, first=2)
    group = optimizer.param_groups[0]
    group["lr"], group["weight_decay"] = 0.37, 0.01
    advance(optimizer, params, 2, first=4)
    fill_grads(params, seed=6)
    optimizer.step(loss=123.0)
    fill_grads(params, seed=7)
    params[3].grad = params[7].grad = None  # there are fewer now
    optimizer.step(loss=loss_at(7))
    fill_grads(params, seed=8)
    optimizer.step(loss=loss_at(8))  # and those left are a step ahead of the two
    assert len(graphs) == first, "a step was compiled again"
    other, theirs = build(which, OTHER, backend="fused", lr=0.2, **moments(which))
    advance(other, theirs, 2)
    assert len(graphs) == first, "another model was compiled again"
    reference, expected = build(which, OTHER, backend="loop", lr=0.2, **moments(which))
    advance(reference, expected, 2)
    assert far(theirs, expected) < 2e-6


@pytest.mark.parametrize("which", slow_but("adamw", "adalo", "diffgrad"))
def test_tensors_that_fill_no_chunk_share_its_code(which, graphs):
    shapes = [(8, 64)] * (execute.CHUNK + 3)
    one, params = build(which, shapes, backend="loop")
    two, theirs = build(which, shapes, backend="fused")
    advance(one, params, 2)
    advance(two, theirs, 2)
    spec = two._plan.calls[0].spec
    if spec.elementwise and not spec.sums:  # zeros fill the last chunk
        assert len(graphs) == 1
    assert far(theirs, params) < 2e-6 and two.effective_lr() == pytest.approx(one.effective_lr())


def test_code_for_one_length_of_rows_does_not_serve_another(graphs):
    shapes = [(24, 64), (24, 80), (24, 77), (30, 64)]
    one, params = build("adafactor_corrected", shapes, backend="loop")
    two, theirs = build("adafactor_corrected", shapes, backend="fused")
    advance(one, params, 2)
    advance(two, theirs, 2)
    assert len(graphs) == 3 and not execute._broken and far(theirs, params) < 2e-6


SPANS = [(96, 2 * codegen.SPAN), (80, 4 * codegen.SPAN), (140, codegen.SPAN), (130, 3 * codegen.SPAN)]


@pytest.mark.parametrize("first", [0, 2])  # which has code made for it
@pytest.mark.parametrize("which", slow_but("adafactor_corrected", "cautious_adamw", "sm3", "smmf"))
def test_large_tensors_share_code_for_rows_of_any_number_of_spans(which, first, graphs, monkeypatch):
    monkeypatch.setattr(plan, "LARGE", 1 << 15)
    shapes = SPANS[first:] + SPANS[:first]
    one, params = build(which, shapes, backend="loop", **moments(which))
    two, theirs = build(which, shapes, backend="fused", **moments(which))
    advance(one, params, 2)
    advance(two, theirs, 2)
    assert len(graphs) == 1 and not execute._broken and far(theirs, params) < 2e-6


@pytest.mark.parametrize("which", ["adamw", "sm3"])
def test_parts_of_one_storage_share_code(which, graphs):
    def parts(numel=24 * 64):
        whole = torch.randn(5 * numel, generator=torch.Generator().manual_seed(0))
        return [torch.nn.Parameter(whole[i * numel + i : (i + 1) * numel + i].view(24, 64)) for i in range(4)]

    params, theirs = parts(), parts()
    advance(hf_optim.create(which, params, backend="loop"), params, 2)
    advance(hf_optim.create(which, theirs, backend="fused"), theirs, 2)
    assert len(graphs) <= 2 and not execute._broken and far(theirs, params) < 2e-6


SIZES = (64, 128, 192, 256, 100, 1)
MANY = [(m, n) for m in SIZES for n in (*SIZES[:4], 77, 3)] + [(k,) for k in SIZES]
MANY += [(64, 3, 7, 7), (64, 64, 3, 3), (64, 64, 1, 1), (128, 64, 3, 3), (128, 64, 1, 1), (64, 1, 3, 3)]


@pytest.mark.parametrize("which", slow_but())
def test_the_shapes_of_many_models_take_two_dozen_graphs(which, graphs):
    for shape in MANY:
        optimizer, params = build(which, [shape], backend="fused", **moments(which))
        advance(optimizer, params, 1)
    assert len(graphs) <= 24 and not execute._broken


def test_more_kinds_of_shapes_than_are_compiled_go_through_the_loop(graphs, caplog, monkeypatch):
    shapes = [(9, 10), (10, 9), (6, 6), (9, 3), (3, 9)]
    one, params = build("adafactor_corrected", shapes, backend="loop")
    two, theirs = build("adafactor_corrected", shapes, backend="fused")
    advance(one, params, 2)
    monkeypatch.setattr(codegen, "VARIANTS", 0)
    advance(two, theirs, 2)
    assert execute._broken and "the compiler failed for Adafactor" in caplog.text
    assert not graphs and far(theirs, params) < 2e-6


def test_options_on_a_schedule_are_left_to_the_loop(graphs, caplog):
    execute.tell_once.cache_clear()
    optimizer, params = build("muon", [(9, 10), (10, 9), (8, 8)], backend="fused")
    reference, theirs = build("muon", [(9, 10), (10, 9), (8, 8)], backend="loop")
    counts = []
    for t in range(1, 12):
        for o, ps in ((optimizer, params), (reference, theirs)):
            o.param_groups[0]["momentum"] = 0.9 - min(t, 6) / 100
            fill_grads(ps, seed=t)
            ps[t % 3].grad = None  # the calls are made anew in every step, as for the experts of a mixture
            o.step()
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[5] < counts[6]  # in the seventh step it stayed what it was
    assert far(params, theirs) < 2e-5 and not execute._broken
    assert sum("an option changed that is compiled into steps" in message for message in caplog.messages) == 1


def test_options_of_weights_that_are_not_compiled_are_not_told_of(caplog):
    execute.tell_once.cache_clear()
    optimizer, params = build("muon", [(9, 10)], torch.float64, backend="fused")
    for t in (1, 2, 3):
        optimizer.param_groups[0]["momentum"] = 0.9 - t / 100
        advance(optimizer, params, 1, first=t)
    assert not [message for message in caplog.messages if "compiled" in message]


def test_defaults_of_torch_play_no_part(graphs):
    optimizer, params = build("adamw", MODEL, backend="fused", precision="stochastic", state_dtype="bfloat16")
    reference, theirs = build("adamw", MODEL, backend="fused", precision="stochastic", state_dtype="bfloat16")
    advance(reference, theirs, 2)
    fresh()
    for t in (1, 2):
        fill_grads(params, seed=t)
        try:
            torch.set_default_dtype(BF16)
            torch.set_default_device("meta")
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert not execute._broken and frozen(params) == frozen(theirs)


@pytest.mark.parametrize("which", slow_but("adamw"))
def test_two_groups_share_code_where_only_rates_differ(which, graphs):
    def run(**second):
        a, b = make_params(MODEL[:4]), make_params(MODEL[:4], seed=1)
        groups = [{"params": a, "lr": 0.1}, {"params": b, **second}]
        optimizer = hf_optim.create(which, groups, backend="fused")
        advance(optimizer, [*a, *b], 2)
        return len(graphs)

    preset = hf_optim.info(which).preset
    first = run(lr=0.2)
    assert first <= 2
    assert run(lr=0.3, **({} if preset.get("decay") == "cpr" else {"weight_decay": 0.5})) == first
    assert run(lookahead=not preset.get("lookahead", False)) > first  # an option is a constant of the code


@pytest.mark.parametrize("which", slow_but("adamw"))
def test_a_state_loaded_into_the_other_backend_continues(which, graphs):
    one, params = build(which, MODEL, backend="loop", **rich(which))
    advance(one, params, 2)
    two = hf_optim.create(which, make_params(MODEL), **rich(which))
    theirs = list(two.parameters())
    for p, q in zip(theirs, params):
        p.data.copy_(q)
    two.load_state_dict(one.state_dict())
    two.param_groups[0]["backend"] = "fused"
    advance(one, params, 2, first=3)
    assert not graphs
    advance(two, theirs, 2, first=3)
    assert graphs and far(theirs, params) < 2e-6


@pytest.mark.parametrize("which", slow_but("adamw"))
def test_precisions_agree_between_backends(which, graphs):
    for options in ({"precision": "kahan"}, {"precision": "stochastic", "state_dtype": "bfloat16"}):
        runs = []
        for backend in ("loop", "fused"):
            optimizer, params = build(which, [(30, 20)] * 4, dtype=BF16, backend=backend, **moments(which), **options)
            advance(optimizer, params, 2)
            runs.append([p.detach() for p in params])
        # scalars are float64 in the loop and fp32 in a graph: a last bit of fp32 tips a bf16 number now and then
        different = torch.cat([(a != b).flatten() for a, b in zip(*runs)]).float().mean()
        assert different < 0.01, (options, different)
        for a, b in zip(*runs):
            assert torch.allclose(a.float(), b.float(), rtol=2**-7)


def test_what_is_not_fused(name, graphs):
    optimizer, params = build(name, [(4, 6)], dtype=torch.float64, backend="fused")
    advance(optimizer, params, 1)  # the scalars of a graph are fp32
    empty, nothing = build(name, [(0, 3)], backend="fused")
    advance(empty, nothing, 1)
    assert not graphs


def test_auto_compiles_large_models_only(name, graphs, monkeypatch, caplog):
    optimizer, params = build(name, [(64, 64)])
    assert optimizer.param_groups[0]["backend"] == "auto"
    advance(optimizer, params, 2)
    hints = ("has no effect while", "pass the model")  # of settings, not of the compiler
    assert not graphs and all(any(hint in r.getMessage() for hint in hints) for r in caplog.records)
    monkeypatch.setattr(execute, "AUTO_NUMEL", 64 * 64)
    large, theirs = build(name, [(64, 64)])
    advance(large, theirs, 2)
    assert len(graphs) == 1 and far(theirs, params) < 2e-6


def test_the_wait_for_the_compiler_is_announced_once(graphs, caplog):
    execute.tell_once.cache_clear()
    optimizer, params = build("adamw", MODEL, backend="fused")
    advance(optimizer, params, 2)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("hf_optim")]
    assert [message.split(":")[0] for message in ours] == ["compiling the step of AdamW"]


# ---- compilers that fail -------------------------------------------------------------------------------------------


def failing(kind, monkeypatch):
    """A step that cannot be traced, and a compiler that is missing."""

    def fail(*_, **__):
        raise RuntimeError("no compiler here\nand more lines")

    if kind == "trace":
        monkeypatch.setattr(codegen, "make_fx", fail)
    else:
        monkeypatch.setattr(codegen, "compile_fx_inner", fail)


@pytest.mark.parametrize("kind", ["trace", "inductor"])
@pytest.mark.parametrize("which", slow_but("adalo", "adamw", "adafactor_corrected", "muon"))
def test_a_compiler_that_fails_leaves_it_to_the_loop(which, kind, monkeypatch, caplog):
    failing(kind, monkeypatch)
    monkeypatch.setattr(execute, "_broken", set())
    fresh()
    one, params = build(which, MODEL, backend="loop", **rich(which))
    two, theirs = build(which, MODEL, backend="fused", **rich(which))
    for _ in range(2):
        more, others = build(which, MODEL, backend="fused", **rich(which))
        advance(more, others, 1)
    advance(one, params, 3)
    advance(two, theirs, 3)
    fresh()
    assert frozen(params) == frozen(theirs)  # every tensor stepped once
    expected, state = everything(one)["state"], everything(two)["state"]
    assert state == expected
    failures = [r for r in caplog.records if "the compiler failed" in r.getMessage()]
    assert len(failures) == 1 and failures[0].levelno == logging.WARNING
    assert type(two).__name__ in failures[0].getMessage() and "backend='loop'" in failures[0].getMessage()
    assert "\n" not in failures[0].getMessage()


def test_other_errors_are_not_swallowed(monkeypatch):
    def run(*args):
        raise MemoryError("out of memory")

    monkeypatch.setattr(codegen, "compile_fx_inner", lambda *_, **__: run)
    monkeypatch.setattr(execute, "_broken", set())
    execute.programs.cache_clear()
    optimizer, params = build("adamw", [(4, 6)], backend="fused")
    fill_grads(params, seed=1)
    with pytest.raises(MemoryError):
        optimizer.step()
    execute.programs.cache_clear()


# ---- blocks of the eager loop --------------------------------------------------------------------------------------


def test_blocks_of_the_loop_change_nothing(name, monkeypatch):
    def run(block, **options):
        monkeypatch.setattr(execute, "BLOCK", block)
        optimizer, params = build(name, [(9, 37), (16, 12), (13,), ()], backend="loop", **options)
        advance(optimizer, params, 3)
        return everything(optimizer)

    for options in (
        rich(name),
        flags_on(name),
        {"dtype": BF16, "precision": "stochastic", "state_dtype": "bfloat16"},
        {"dtype": BF16, "precision": "kahan", "weight_decay": 0.1},
    ):
        assert run(1 << 17, **options) == run(64, **options)


# ---- generated code ------------------------------------------------------------------------------------------------


def compare_with_inductor(name, shapes, **options):
    fresh()
    one, params = build(name, shapes, backend="loop", **options)
    two, theirs = build(name, shapes, backend="fused", **options)
    advance(one, params, 3)
    advance(two, theirs, 3)
    assert not execute._broken
    return one, params, two, theirs


def test_what_a_rule_moves_from_buffer_to_buffer_is_not_overwritten_first():
    one, params = build("fractional_adamw", [(24, 64)], backend="loop", memory="window")
    two, theirs = build("fractional_adamw", [(24, 64)], backend="fused", memory="window")
    advance(one, params, 4)
    advance(two, theirs, 4)
    assert not execute._broken and far(theirs, params) < 2e-6
    states = zip(one.state[params[0]].values(), two.state[theirs[0]].values())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in states if isinstance(a, torch.Tensor))


def test_generated_code_equals_the_loop():
    options = {"dtype": BF16, "precision": "kahan", "state_dtype": "bfloat16", "weight_decay": 0.1}
    one, params, two, theirs = compare_with_inductor("adamw", [(64, 64)], **options)
    (chunk,) = two._plan.calls[0].chunks
    assert not isinstance(chunk.program.code, OutputCode)  # which looks for profilers at every call
    (p,), (q,) = params, theirs
    a, b = one.state[p], two.state[q]
    assert b["residual"].count_nonzero() > 0.9 * p.numel()  # Inductor folds the textbook form to exactly 0
    value, other = (w.detach().float() + s["residual"].float() for w, s in ((p, a), (q, b)))
    assert (value != other).float().mean() < 0.1 and torch.allclose(value, other, rtol=2**-14, atol=0)
    for key in ("m", "v"):  # the same random bits: hardly a number falls to the other side
        assert (a[key] != b[key]).float().mean() < 0.01 and bits(a[key]) != bits(torch.zeros_like(a[key]))


def test_the_compiler_is_not_given_loops_that_nothing_reads(monkeypatch):
    given, used = [], []
    init = Scheduler._init

    def count(scheduler, operations):
        init(scheduler, operations)
        given.append(len(operations))
        used.append(sum(len(node.get_nodes()) for node in scheduler.nodes))

    monkeypatch.setattr(Scheduler, "_init", count)
    with fresh_cache():
        compare_with_inductor("adamw", [(24, 64)], dtype=BF16, precision="kahan")
    assert used[0] >= 4 and given[0] <= used[0] + 1  # three times as many: every value made from what is written


@pytest.mark.skipif(not cpu_vec_isa.pick_vec_isa(), reason="needs a CPU with vectors that Inductor knows")
@pytest.mark.skipif(os.name == "nt", reason="fetches nothing ahead")
def test_vectors_are_filled_and_fetched_as_a_cpu_is_good_at():
    fresh()
    optimizer, params = build("smmf", [(256, 1024)], BF16, backend="fused")
    fill_grads(params, seed=1)
    with config.patch(force_disable_caches=True):
        code = "".join(run_and_get_code(optimizer.step)[1])
    assert not execute._broken and "convert<float,2,uint8_t,1>" in code
    assert "convert<int32_t,2,uint8_t,1>" not in code  # entry by entry through memory: twice as long a step
    ahead = re.findall(r"prefetch\(in_ptr\d+ \+ .*? \+ (\d+)\); return at::vec::Vectorized<at::BFloat16>", code)
    assert {*map(int, ahead)} == {codegen.AHEAD // 2, codegen.AHEAD // 8}  # along rows, and down columns


def test_vector_instructions_are_tried_out_until_they_work(monkeypatch):
    tried = []

    def dry_compile(isa, code):
        tried.append((type(isa), "#include" in code))
        return type(isa) is not VecAMX

    monkeypatch.setattr(codegen, "dry_compile", dry_compile)
    monkeypatch.setattr(codegen, "_built", set())
    with codegen.repaired(set()):
        answers = [isa.check_build(isa._avx_code) for isa in (VecAMX(), VecAVX512(), VecAVX2())]
    assert answers == [False, True, True]
    assert tried == [(VecAMX, False), (VecAVX512, False)]  # torch's headers would take longer than all the rest


def compile_another():
    compare_with_inductor("adalo", [(24, 8)], dtype=BF16)


def test_bits_of_a_constant_are_compiled():
    """Those of the mean of an empty shard, say, which is NaN: Inductor has them computed once, not for a vector."""

    def bits_of_nan(x):
        return [torch.where(x > 0, torch.full_like(x, float("nan")).view(torch.int32), 7)]

    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    program = codegen.Programs(bits_of_nan, 1, False, None).serving([x])
    assert torch.equal(program.code([x])[0], bits_of_nan(x)[0])


def test_a_forked_process_compiles_after_its_parent_did():
    with fresh_cache():  # where all is in the cache, none of Inductor's threads is asked
        compare_with_inductor("adalo", [(24, 8)])
        launch(1, compile_another)


def test_code_on_disk_is_that_of_this_version(monkeypatch):
    """Two versions that differ in how they patch Inductor hand it the same graph."""
    with fresh_cache():
        for tag, hits in (("one", 0), ("one", 1), ("two", 0)):
            monkeypatch.setattr(codegen, "TAG", tag)
            counters.clear()
            compare_with_inductor("adalo", [(24, 8)])
            assert counters["inductor"]["fxgraph_cache_hit"] == hits


def test_code_on_disk_is_for_the_vectors_of_this_machine(monkeypatch):
    """Loops in steps of 8, compiled where a vector holds 16, write past the end of a tensor."""
    with fresh_cache():
        for vectors, hits in (("default", 0), ("", 0), ("", 1)):  # none, and those that the CPU has
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", vectors)
            counters.clear()
            compare_with_inductor("adalo", [(24, 8)])
            assert counters["inductor"]["fxgraph_cache_hit"] == hits


def test_code_on_disk_is_for_the_sizes_that_it_was_written_for(monkeypatch):
    """Left to itself, Inductor sums more than 4096 entries by other code."""
    monkeypatch.setattr(codegen, "_in_parts", CppKernel.need_use_acc_helper)
    with fresh_cache():
        for rows, hits in ((128, 0), (8, 0), (128, 1), (8, 1)):
            counters.clear()
            compare_with_inductor("lamb", [(rows, 100)])
            assert counters["inductor"]["fxgraph_cache_hit"] == hits


def test_sums_over_the_model_are_one_program_for_all_sizes(monkeypatch):
    monkeypatch.setattr(execute, "CHUNK", 4)
    shapes = [(16, 8), (80, 80), (80, 80), (16, 8), (16, 16), (16, 8)]
    _, params, optimizer, theirs = compare_with_inductor(
        "stable_decay_adamw", shapes, decay="stable", weight_decay=0.1
    )
    (call,) = optimizer._plan.calls
    assert len(call.chunks) == 3 and len({id(chunk.sums.code) for chunk in call.chunks}) == 1
    assert far(theirs, params) < 2e-6


OF_THE_MODEL = {
    "am_sgd": {"scope": "model"},
    "nsgda": {"scope": "model"},
    "stable_decay_adamw": {"decay": "stable"},
    "adafactor_corrected": {"decay": "stable"},
}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])  # of what is read, rounded by noise that sums lack
@pytest.mark.parametrize("which", OF_THE_MODEL)
def test_sums_over_the_model_equal_those_of_the_loop(which, state_dtype, graphs, monkeypatch):
    options = {**OF_THE_MODEL[which], "weight_decay": 5.0, "state_dtype": state_dtype}
    one, params = build(which, MODEL, backend="loop", **options)
    two, theirs = build(which, MODEL, backend="fused", **options)
    advance(one, params, 3)
    advance(two, theirs, 1)
    monkeypatch.setattr(execute, "measure_tensor", None)  # they are in the code: no tensor is measured by itself
    advance(two, theirs, 2, first=2)
    assert graphs and not execute._broken and far(theirs, params) < 2e-6


@pytest.mark.parametrize("which", slow_but("smmf"))
def test_generated_code_for_spans_equals_the_loop(which, monkeypatch):
    monkeypatch.setattr(plan, "LARGE", 1 << 15)
    _, params, _, theirs = compare_with_inductor(which, SPANS, **moments(which))
    assert far(theirs, params) < 2e-6
    options = {"dtype": BF16, "precision": "kahan", **brisk(which)}
    one, params, two, theirs = compare_with_inductor(which, SPANS, **options, **moments(which))
    whole = [
        [p.detach().float() + o.state[p]["residual"].float() for p in ps] for o, ps in ((one, params), (two, theirs))
    ]
    apart = torch.cat([((a - b).abs() / (1 + b.abs())).flatten() for a, b in zip(*whole)])
    assert (apart > 2**-14).float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("flags", [False, True])
def test_generated_code_equals_the_loop_for_all(name, flags):
    options = {**brisk(name), **(flags_on(name) if flags else rich(name))}
    _, params, _, theirs = compare_with_inductor(name, [(40, 24), (5, 3, 4), (33,), ()], **options)
    assert far(theirs, params) < 2e-6
    options = {"dtype": BF16, "precision": "stochastic", "state_dtype": "bfloat16", **moments(name)}
    _, params, _, theirs = compare_with_inductor(name, [(64, 64), (33,)], **options)
    different = torch.cat([(p != q).flatten() for p, q in zip(params, theirs)]).float().mean()
    assert different < 0.01


# ---- what is read and stored ---------------------------------------------------------------------------------------


def places(graph, kind):
    """Positions of the nodes of a kind, in the order of the graph."""
    return [i for i, node in enumerate(graph.nodes) if getattr(node.target, "__name__", "").startswith(kind)]


@pytest.mark.parametrize("which, early", [("cautious_adamw", ("m",)), ("lamb", ("m", "v")), ("smmf", ("weight",))])
def test_what_waits_for_no_reduction_comes_before_them(which, early, graphs):
    optimizer, params = build(which, [(40, 32), (40, 32), (40, 32)], backend="fused", weight_decay=0.1)
    advance(optimizer, params, 1)
    names = ["weight", *optimizer.spec(optimizer.param_groups[0], params[0], [{}]).stored]
    for module in graphs:
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        reduced, written = places(module.graph, "sum") + places(module.graph, "mean"), places(module.graph, "copy_")
        nodes = list(module.graph.nodes)
        before = {nodes[i].args[0] for i in written if i < min(reduced)}
        first = dict(zip(names, inputs))  # the buffers of the first tensor
        # what follows the reductions reads new moments again, and writes one that none of them needs; the weight of
        # SMMF waits for none of them
        looked_at = {first[name] for name in {"weight", "m", "v"} & first.keys()}
        assert before & looked_at == {first[name] for name in early}


@pytest.mark.parametrize(
    "which",
    [pytest.param(n, marks=pytest.mark.slow) for n in ("lamb", "smmf", "sm3")]
    + ["adafactor_corrected", "am_sgd", "stable_decay_adamw"],
)
def test_no_temporary_is_as_large_as_the_weight(which):
    options = {"backend": "fused", "weight_decay": 0.1, **OF_THE_MODEL.get(which, {})}
    optimizer, params = build(which, [(1024, 512)], **options)
    advance(optimizer, params, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert not execute._broken and sizes and max(sizes) < params[0].nbytes / 8


ONE_STEP = """
import torch, hf_optim
p = torch.nn.Parameter(torch.ones(64, 64))
p.grad = torch.ones(64, 64)
hf_optim.create("adalo", [p], backend="fused").step(loss=torch.tensor(1.0))
"""


def test_half_written_code_on_disk_is_written_anew(tmp_path):
    def told():  # by a process that has not loaded the code yet
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", ONE_STEP], env=env, capture_output=True, text=True, check=True
        ).stderr

    told()
    (code,) = tmp_path.glob("*/*.main.so")
    for listed in (True, False):  # whether Inductor still knows the graph, or only the C++ that it writes for it
        code.write_bytes(b"")
        if not listed:
            shutil.rmtree(tmp_path / "fxgraph")
        assert "the compiler failed" not in told() and code.stat().st_size > 0


def test_no_file_but_that_of_the_compiler_is_removed(tmp_path, monkeypatch):
    module = tmp_path / "module.py"
    module.touch()

    def fails(*args, **kwargs):
        raise ImportError("cannot import name 'x'", path=str(module))

    monkeypatch.setattr(codegen, "compile_fx_inner", fails)
    monkeypatch.setattr(execute, "_broken", set())
    execute.programs.cache_clear()
    (p,) = make_params(((8, 8),))
    optimizer = hf_optim.create("adalo", [p], backend="fused")
    p.grad = torch.ones_like(p)
    optimizer.step(loss=torch.tensor(1.0))
    assert execute._broken == {type(optimizer)} and module.exists()


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def step(optimizer, params, t, mode="default"):
    """A step as Trainer makes it, the loss on the device; with `mode` "error" it may not wait for the device."""
    fill_grads(params, seed=t)
    loss = torch.tensor(loss_at(t), device=params[0].device) if optimizer.needs_loss else None
    torch.cuda.set_sync_debug_mode(mode)
    try:
        optimizer.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, rounding", [(torch.float32, {}), (BF16, {"precision": "kahan", "state_dtype": "int8"})]
)
def test_steps_on_a_gpu_equal_those_of_the_loop_and_wait_for_nothing(name, dtype, rounding, monkeypatch):
    monkeypatch.setattr(execute, "CHUNK", 3)
    fresh()
    options = {**brisk(name), **rounding}
    one, params = build(name, MODEL, dtype, device="cuda", backend="loop", **options)
    two, theirs = build(name, MODEL, dtype, device="cuda", backend="fused", **options)
    for optimizer, own in ((one, params), (two, theirs)):
        step(optimizer, own, 1)  # makes state, code and a plan
        for t in (2, 3):
            step(optimizer, own, t, "error")
    # a step of bf16, where a few entries may fall to the other side and Muon multiplies; the weights moved by 1.5e-2
    bound = 2e-6 if dtype == torch.float32 and name != "muon" else 4e-3
    assert not execute._broken and far(theirs, params) < bound


@pytest.mark.gpu
def test_squares_too_small_for_a_gpu_do_no_harm(name):
    optimizer, (p,) = build(name, [(8, 64)], device="cuda", backend="fused")
    for _ in range(2):
        p.grad = torch.full_like(p, 1e-20)
        optimizer.step(loss=torch.ones((), device="cuda"))
    assert not execute._broken and p.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rule, most", [("adamw", 4), ("adafactor_corrected", 32)])  # in two calls of 16 tensors
def test_small_tensors_share_a_launch(rule, most):
    optimizer, params = build(rule, [(16, 64)] * 32, device="cuda", backend="fused")
    for t in (1, 2):
        step(optimizer, params, t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(optimizer, params, 3)
    launches = sum(event.count for event in profile.key_averages() if event.key.startswith("triton_"))
    assert 0 < launches <= most  # torch 2.11 puts 8 tensors into a kernel
