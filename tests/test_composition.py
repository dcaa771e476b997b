# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Flags in twos and threes on every optimizer: either refused by name, or loop = fused, finite and resumable, with the
gradient untouched."""

import itertools
import random

import pytest
import torch
from conftest import advance, fill_grads, make_params
from engine import bits, everything, reloaded

import hf_optim
from hf_optim.core import FLAGS, execute
from hf_optim.core.flags import DEFAULTS, techniques


SHAPES = [(6, 4), (7,), (), (4, 3, 2, 2)]
OPTIONS = {  # short clocks, so that what waits for its step acts within a few
    "lookahead_k": 2,
    "cpr_steps": 2,
    "agc_clip": 0.5,
}


def settings(name):
    """Every setting of every flag that is not the default: [("agc", True), ("decay", "cpr"), ...]."""
    cls = hf_optim.info(name).cls
    return [(flag, v) for flag in FLAGS for v in techniques(flag, cls) if v != DEFAULTS.get(flag)]


def combinations(name, size):
    """Sets of settings of different flags."""
    picks = itertools.combinations(settings(name), size)
    return [dict(pick) for pick in picks if len({flag for flag, _ in pick}) == size]


def build(name, flags, **options):
    """(optimizer, parameters), or None where the flags are refused; the refusal must name one of them."""
    info = hf_optim.info(name)
    live = {k for flag, value in flags.items() for k in FLAGS[flag][value].options}
    extra = {k: v for k, v in OPTIONS.items() if k in live}
    extra |= {"weight_decay": 0.1} if flags.get("decay", info.preset.get("decay")) != "cpr" else {}
    if flags.get("decay") == "cpr":
        extra |= {"cpr_init": "warm_start"}
    params = make_params(SHAPES)
    needs = {k: 0.9 for k in ("momentum", "beta1") if k in info.options and not info.options[k].default}
    try:
        return hf_optim.create(name, params, **{**needs, **extra, **flags, **options}), params
    except ValueError as error:
        assert "cannot act" in str(error) and any(f"`{flag}" in str(error) for flag in flags), error
        return None


def check(name, flags, fused):
    """Run one combination. Returns whether it was accepted."""
    made = build(name, flags, backend="loop")
    if made is None:
        return False
    optimizer, params = made
    advance(optimizer, params, 3)
    saved, weights = reloaded(optimizer.state_dict()), [p.detach().clone() for p in params]
    for g in fill_grads(params, seed=4):
        g.requires_grad_(False)
    given = [bits(p.grad) for p in params]
    optimizer.step(loss=1.0)
    assert [bits(p.grad) for p in params] == given, "the gradient was written to"
    advance(optimizer, params, 2, first=5)
    assert all(p.isfinite().all() for p in params)
    assert any(not torch.equal(p, w) for p, w in zip(params, weights))
    again, theirs = build(name, flags, backend="loop")
    for p, w in zip(theirs, weights):
        p.data.copy_(w)
    again.load_state_dict(saved)
    fill_grads(theirs, seed=4)
    again.step(loss=1.0)
    advance(again, theirs, 2, first=5)
    assert everything(again) == everything(optimizer), "resumed is not uninterrupted"
    if fused:
        execute.programs.cache_clear()
        other, compiled = build(name, flags, backend="fused")
        advance(other, compiled, 3)
        fill_grads(compiled, seed=4)
        other.step(loss=1.0)
        advance(other, compiled, 2, first=5)
        assert not execute._broken
        for p, q in zip(params, compiled):
            torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-5)
    return True


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr(execute, "_broken", set())


def drawn(name, size, count):
    """The same combinations in every run, other ones for every name."""
    known = combinations(name, size)
    return random.Random(name).sample(known, min(count, len(known)))


def test_pairs_and_triples(class_name):
    accepted = [check(class_name, flags, fused=False) for size in (2, 3) for flags in drawn(class_name, size, 8)]
    assert sum(accepted) >= 6


CLASSES = {hf_optim.info(n).cls: n for n in reversed(hf_optim.list_optimizers())}.values()
FAST = ("adafactor_corrected",)


@pytest.mark.parametrize("which", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CLASSES])
def test_a_triple_compiled(which):
    accepted = (check(which, flags, fused=True) for flags in drawn(which, 3, 20))
    assert any(accepted)  # stops at the first that is


@pytest.mark.slow
def test_every_pair(name):
    accepted = [check(name, flags, fused=False) for flags in combinations(name, 2)]
    assert sum(accepted) > len(accepted) / 2


@pytest.mark.slow
def test_pairs_and_triples_compiled(class_name):
    accepted = [check(class_name, flags, fused=True) for size in (2, 3) for flags in drawn(class_name, size, 5)]
    assert sum(accepted) >= 4


def test_settings_that_exclude_each_other_are_refused_by_name():
    for one, two in itertools.combinations(("agc", "soft_clip", "normalize"), 2):
        with pytest.raises(ValueError, match=f"`{two}` cannot act with `{one}`"):
            hf_optim.create("adamw", make_params([(2, 2)]), **{one: True, two: True})
    with pytest.raises(ValueError, match="`weight_decay=0.1` cannot act on AdamW: `decay=cpr` takes its place"):
        hf_optim.create("cpr_adamw", make_params([(2, 2)]), weight_decay=0.1)
    with pytest.raises(ValueError, match="`trust_ratio=True` cannot act on SpectralAdamW"):
        hf_optim.create("spectral_adamw", make_params([(2, 2)]), trust_ratio=True)
