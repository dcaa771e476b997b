# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The fused backend: few graphs, none later, the numbers of the loop, and the loop where a compiler fails.

Most tests let Dynamo trace and run its graphs as they are: that is where graphs are counted, and it takes a second
where code generation takes ten.
"""

import logging

import pytest
import torch
from conftest import advance, fill_grads, loss_at, make_params
from engine import BF16, bits, brisk, build, everything, flags_on, frozen, moments, rich

import hf_optim
from hf_optim.core import execute


# nine matrices and nine vectors: a full chunk and a single tensor of each rank; a scalar, sizes of one, nothing
MODEL = (*((4 + i, 6) for i in range(9)), *((5 + i,) for i in range(9)), (), (1,), (1, 4), (3, 2, 2), (0, 3))
OTHER = (*((7 + i, 3 + i) for i in range(9)), *((11 + i,) for i in range(9)), (), (1,), (1, 9), (5, 4, 3), (2, 0))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs traced so far, in a process that seems to have compiled nothing yet."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    monkeypatch.setattr(execute, "_broken", False)
    fresh()
    yield traced
    fresh()


def fresh():
    execute.compiled.cache_clear()
    torch._dynamo.reset()


def far(params, others):
    return max(((p - q).abs().max() / (1 + q.abs().max())).item() for p, q in zip(params, others) if p.numel())


@pytest.mark.parametrize("flags", [False, True])
def test_fused_steps_are_the_steps_of_the_loop(name, flags, graphs):
    options = {**brisk(name), **(flags_on(name) if flags else rich(name)), "weight_decay": 0.1}
    one, params = build(name, MODEL, backend="loop", **options)
    two, theirs = build(name, MODEL, backend="fused", **options)
    advance(one, params, 3)
    assert not graphs
    advance(two, theirs, 3)
    assert graphs and far(theirs, params) < 2e-6
    assert [two.state[p]["step"] for p in theirs] == [one.state[p]["step"] for p in params]


def test_few_graphs_and_none_later(name, graphs):
    optimizer, params = build(name, MODEL, backend="fused", **moments(name))
    advance(optimizer, params, 1)
    first = len(graphs)
    # two chunk sizes of: long, one element / and by rank and by axes of one element, where the shape is part of the rule
    assert first <= (3 if optimizer.elementwise else 10)
    advance(optimizer, params, 2, first=2)
    group = optimizer.param_groups[0]
    group["lr"], group["weight_decay"] = 0.37, 0.01
    advance(optimizer, params, 2, first=4)
    if optimizer.needs_loss:
        fill_grads(params, seed=6)
        optimizer.step(loss=123.0)
    fill_grads(params, seed=7)
    params[3].grad = params[12].grad = None  # eight are left of each nine
    optimizer.step(loss=loss_at(7))
    fill_grads(params, seed=8)
    optimizer.step(loss=loss_at(8))  # and are a step ahead of the ninth
    assert len(graphs) == first, "a step was compiled again"
    other, theirs = build(name, OTHER, backend="fused", lr=0.2, **moments(name))
    advance(other, theirs, 2)
    assert len(graphs) == first, "another model was compiled again"
    reference, expected = build(name, OTHER, backend="loop", lr=0.2, **moments(name))
    advance(reference, expected, 2)
    assert far(theirs, expected) < 2e-6


def test_two_groups_share_code_where_only_rates_differ(name, graphs):
    def run(**second):
        a, b = make_params(MODEL[:9]), make_params(MODEL[:9], seed=1)
        groups = [{"params": a, "lr": 0.1, "weight_decay": 0.1}, {"params": b, **second}]
        optimizer = hf_optim.create(name, groups, backend="fused")
        advance(optimizer, [*a, *b], 2)
        return len(graphs)

    assert run(lr=0.2) == run(lr=0.3, weight_decay=0.5) <= 2
    before = len(graphs)
    assert run(lookahead=True) > before  # an option is a constant of the code


def test_a_state_loaded_into_the_other_backend_continues(name, graphs):
    one, params = build(name, MODEL, backend="loop", **rich(name))
    advance(one, params, 2)
    saved = one.state_dict()
    two = hf_optim.create(name, make_params(MODEL), **rich(name))
    theirs = list(two.parameters())
    for p, q in zip(theirs, params):
        p.data.copy_(q)
    two.load_state_dict(saved)
    two.param_groups[0]["backend"] = "fused"
    advance(one, params, 2, first=3)
    assert not graphs
    advance(two, theirs, 2, first=3)
    assert graphs and far(theirs, params) < 2e-6


def test_precisions_agree_between_backends(name, graphs):
    for options in ({"precision": "kahan"}, {"precision": "stochastic", "state_dtype": "bfloat16"}):
        runs = []
        for backend in ("loop", "fused"):
            optimizer, params = build(name, MODEL[:10], dtype=BF16, backend=backend, **moments(name), **options)
            advance(optimizer, params, 2)
            runs.append([p.detach() for p in params])
            if options["precision"] == "kahan":
                assert any(optimizer.state[p]["residual"].any() for p in params)
        # scalars are float64 in the loop and fp32 in a graph: a last bit of fp32 tips a bf16 number now and then
        different = torch.cat([(a != b).flatten() for a, b in zip(*runs)]).float().mean()
        assert different < 0.02, (options, different)
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
    assert not graphs and not caplog.records
    monkeypatch.setattr(execute, "AUTO_NUMEL", 64 * 64)
    large, theirs = build(name, [(64, 64)])
    advance(large, theirs, 2)
    assert len(graphs) == 1 and far(theirs, params) < 2e-6


def test_the_wait_for_the_compiler_is_announced_once(graphs, caplog):
    execute._announce.cache_clear()
    optimizer, params = build("adamw", MODEL, backend="fused")
    advance(optimizer, params, 2)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["compiling the step of AdamW"]


# ---- compilers that fail -------------------------------------------------------------------------------------------


def failing(kind):
    """A replacement of torch.compile: how a missing C++ compiler, a broken one and an unsupported graph show."""

    def compile_(function, **_):
        def run(*args):
            if kind == "dynamo":
                raise torch._dynamo.exc.Unsupported("graph break in a place\nand more lines")
            if kind == "inductor":
                raise torch._inductor.exc.InductorError(RuntimeError("no compiler here"))
            return function(*args)

        return run

    return compile_


@pytest.mark.parametrize("kind", ["dynamo", "inductor", "backend"])
def test_a_compiler_that_fails_leaves_it_to_the_loop(name, kind, monkeypatch, caplog):
    if kind == "backend":

        def backend(graph, inputs):
            raise RuntimeError("cannot generate code")

        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=backend, **options))
    else:
        monkeypatch.setattr(torch, "compile", failing(kind))
    monkeypatch.setattr(execute, "_broken", False)
    execute._announce.cache_clear()
    fresh()
    one, params = build(name, MODEL, backend="loop", **rich(name))
    two, theirs = build(name, MODEL, backend="fused", **rich(name))
    for _ in range(2):
        more, others = build(name, MODEL, backend="fused", **rich(name))
        advance(more, others, 1)
    advance(one, params, 3)
    advance(two, theirs, 3)
    fresh()
    assert frozen(params) == frozen(theirs)  # every tensor stepped once
    expected, state = everything(one)["state"], everything(two)["state"]
    assert state == expected
    failures = [r for r in caplog.records if "torch.compile failed" in r.getMessage()]
    assert len(failures) == 1 and failures[0].levelno == logging.WARNING
    assert type(two).__name__ in failures[0].getMessage() and "backend='loop'" in failures[0].getMessage()
    assert "\n" not in failures[0].getMessage()


def test_other_errors_are_not_swallowed(monkeypatch):
    def compile_(function, **_):
        def run(*args):
            raise MemoryError("out of memory")

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(execute, "_broken", False)
    execute.compiled.cache_clear()
    optimizer, params = build("adamw", [(4, 6)], backend="fused")
    fill_grads(params, seed=1)
    with pytest.raises(MemoryError):
        optimizer.step()
    execute.compiled.cache_clear()


# ---- blocks of the eager loop --------------------------------------------------------------------------------------


def test_blocks_of_the_loop_change_nothing(name, monkeypatch):
    def run(block, **options):
        monkeypatch.setattr(execute, "BLOCK", block)
        optimizer, params = build(name, [(9, 7), (13,), ()], backend="loop", **options)
        advance(optimizer, params, 3)
        return everything(optimizer)

    for options in (
        rich(name),
        flags_on(name),
        {"dtype": BF16, "precision": "stochastic", "state_dtype": "bfloat16"},
        {"dtype": BF16, "precision": "kahan", "weight_decay": 0.1},
    ):
        assert run(1 << 17, **options) == run(16, **options)  # 16: what a vector register holds, tails apart


# ---- generated code ------------------------------------------------------------------------------------------------


def compare_with_inductor(name, shapes, **options):
    fresh()
    one, params = build(name, shapes, backend="loop", **options)
    two, theirs = build(name, shapes, backend="fused", **options)
    advance(one, params, 3)
    advance(two, theirs, 3)
    assert not execute._broken
    return one, params, two, theirs


def test_generated_code_equals_the_loop():
    options = {"dtype": BF16, "precision": "kahan", "state_dtype": "bfloat16", "weight_decay": 0.1}
    one, params, two, theirs = compare_with_inductor("adamw", [(64, 64)], **options)
    (p,), (q,) = params, theirs
    a, b = one.state[p], two.state[q]
    assert b["residual"].count_nonzero() > 0.9 * p.numel()  # Inductor folds the textbook form to exactly 0
    value, other = (w.detach().float() + s["residual"].float() for w, s in ((p, a), (q, b)))
    assert (value != other).float().mean() < 0.1 and torch.allclose(value, other, rtol=2**-14, atol=0)
    for key in ("m", "v"):  # the same random bits: hardly a number falls to the other side
        assert (a[key] != b[key]).float().mean() < 0.01 and bits(a[key]) != bits(torch.zeros_like(a[key]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [False, True])
def test_generated_code_equals_the_loop_for_all(name, flags):
    options = {**brisk(name), **(flags_on(name) if flags else rich(name))}
    _, params, _, theirs = compare_with_inductor(name, MODEL, **options)
    assert far(theirs, params) < 2e-6
    options = {"dtype": BF16, "precision": "stochastic", "state_dtype": "bfloat16", **moments(name)}
    _, params, _, theirs = compare_with_inductor(name, [(64, 64), (33,)], **options)
    different = torch.cat([(p != q).flatten() for p, q in zip(params, theirs)]).float().mean()
    assert different < 0.01
