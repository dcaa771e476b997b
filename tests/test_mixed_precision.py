# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Autocast, loss scaling, steps that are skipped, gradients of every size: weights stay finite and nothing leaks."""

import logging
import os
import random

import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import loss_at
from engine import BF16, brisk, build, everything, flags_on, frozen, rich
from ranks import launch
from transformers import TrainerCallback

import hf_optim
from hf_optim.trainer.loss import innermost


FP16 = torch.float16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = ((3, 4), (5,))
SCHEDULES = 40  # of each of the 25 names: 1,000


# ---- four precisions -----------------------------------------------------------------------------------------------

PRECISIONS = {  # dtype of the weights, of autocast
    "fp32": (torch.float32, None),
    "bf16-autocast": (torch.float32, BF16),
    "bf16-weights": (BF16, None),
    "fp16-autocast": (torch.float32, FP16),
}


def network(dtype, device):
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 6)
    return torch.nn.Sequential(*layers).to(device, dtype)


def back_propagate(net, scaler, optimizer, t, autocast):
    """Unscaled gradients of batch `t`. Returns its loss."""
    p = next(net.parameters())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t)).to(p)
    with torch.autocast(p.device.type, autocast, enabled=autocast is not None):
        out = net(x)
        assert out.dtype == (autocast or p.dtype)
        loss = (out.float() - x.float()).square().mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return loss.detach()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_are_those_that_the_gradients_imply(name, precision, device):
    dtype, autocast = PRECISIONS[precision]
    net, shadow = network(dtype, device), network(dtype, device).float()
    start = [p.detach().clone() for p in net.parameters()]
    optimizer, reference = hf_optim.create(name, net, **brisk(name)), hf_optim.create(name, shadow, **brisk(name))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=autocast == FP16)
    for t in range(1, 6):
        loss = back_propagate(net, scaler, optimizer, t, autocast)
        for p, q in zip(net.parameters(), shadow.parameters()):
            assert p.grad.dtype == dtype and p.grad.isfinite().all()
            q.grad = p.grad.float()
        optimizer.report_loss(loss)
        scaler.step(optimizer)
        scaler.update()
        reference.step(loss=loss)
        with torch.no_grad():
            for q in shadow.parameters():
                q.copy_(q.to(dtype))
    for p, q, was in zip(net.parameters(), shadow.parameters(), start):
        assert p.dtype == dtype and p.isfinite().all() and torch.equal(p.float(), q) and not torch.equal(p, was)
    assert frozen(optimizer.state_dict()) == frozen(reference.state_dict())
    buffers = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    assert {x.dtype for x in buffers} <= {torch.float32, torch.uint8}


REFUSE_RELEASE = ("am_sgd", "stable_decay_adamw")
INSIDE = [
    (name, way)
    for name in hf_optim.list_optimizers()
    for way in ("step", "released")
    if not (way == "released" and name in REFUSE_RELEASE)
]


@pytest.mark.parametrize("autocast", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("which", "way"), INSIDE)
def test_a_step_inside_autocast_is_the_same(which, way, autocast):
    def run(enabled):
        net = network(torch.float32, "cpu")
        optimizer = hf_optim.create(which, net, **brisk(which))
        if way == "released":
            optimizer.release_gradients()
        for t in (1, 2):
            generator = torch.Generator().manual_seed(t)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in net.parameters())
            optimizer.zero_grad()
            optimizer.report_loss(loss_at(t))
            with torch.autocast("cpu", autocast, enabled=enabled):
                loss.backward()
                optimizer.step()
        return everything(optimizer)

    assert run(True) == run(False)


# ---- skipped steps -------------------------------------------------------------------------------------------------


def set_grads(params, draw, factor, bad):
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * factor
    if bad:
        grad = draw.choice(params).grad.view(-1)
        grad[draw.randrange(grad.numel())] = draw.choice([float("inf"), -float("inf"), float("nan")])


def run_schedule(name, options, dtype, seed, skips, how):
    """Everything about a run whose steps number `skips` meet an infinite gradient; `how` is None: they never were."""
    optimizer, params = build(name, SHAPES, dtype, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    stepper = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler) if how == "accelerate" else None
    for t in range(1, 8):
        if how is None and t in skips:
            continue
        factor = 1.0 if how is None else float(scaler.scale(torch.ones(())))  # a power of two: exact
        set_grads(params, random.Random(f"{seed}-{t}"), factor, t in skips)
        optimizer.report_loss(1e6 if t in skips else loss_at(t))
        if how is None:
            optimizer.step()
        elif how == "accelerate":
            stepper.step()
            assert stepper.step_was_skipped is (t in skips)
        else:
            scaler.step(optimizer)
            scaler.update()
    return everything(optimizer)


def test_random_schedules_of_skipped_steps_leave_no_trace(name):
    Accelerator(cpu=True)  # the state that AcceleratedOptimizer looks at
    kinds = [({}, torch.float32), (rich(name), torch.float32), (flags_on(name), BF16), ({"precision": "kahan"}, BF16)]
    for number in range(SCHEDULES):
        draw = random.Random(f"{name}-{number}")
        skips = {t for t in range(1, 8) if draw.random() < draw.choice((0.2, 0.5, 0.8))} or {draw.randrange(1, 8)}
        options, dtype = kinds[number % 4]
        arguments = name, options, dtype, number, skips
        how = ("scaler", "accelerate")[number // 4 % 2]
        assert run_schedule(*arguments, how) == run_schedule(*arguments, None), (number, skips, how)


# ---- gradients of every size ---------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)


def step_of_size(optimizer, params, t, size):
    """A step with gradients of +-size."""
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator).sign() * size).to(p.dtype)
    optimizer.step(loss=loss_at(t) if optimizer.needs_loss else None)


def bad_decades(name, dtype, decades):
    """Powers of ten for which three steps with such gradients leave a weight that is not finite."""
    bad = []
    for decade in decades:
        optimizer, params = build(name, SHAPES, dtype)
        for t in (1, 2, 3):
            step_of_size(optimizer, params, t, 10.0**decade)
        if not all(p.isfinite().all() for p in params):
            bad.append(decade)
    return bad


@DTYPES
def test_gradients_of_every_size_leave_weights_finite(name, dtype):
    assert bad_decades(name, dtype, range(-38, 39)) == []


@DTYPES
def test_learning_goes_on_within_ten_steps_of_an_overflow(name, dtype):
    optimizer, params = build(name, SHAPES, dtype, **brisk(name))
    for t in range(1, 15):
        before = [p.detach().clone() for p in params]
        step_of_size(optimizer, params, t, 1e38 if t == 4 else 1.0)
    for p, was in zip(params, before):
        assert p.isfinite().all() and not torch.equal(p, was)


# ---- the guard of LossAwareTrainer ---------------------------------------------------------------------------------


class Faulty(hf_optim.LossAwareTrainer):
    """A run with `faults` {step: kind}, which keeps everything about the optimizer after every step."""

    def __init__(self, *args, faults, **kwargs):
        super().__init__(*args, **kwargs)
        self.faults, self.history = faults, []
        self.add_callback(Historian(self))

    def fault(self, kind):
        return self.faults.get(self.state.global_step + 1) == kind

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.fault("nan"):
            return loss * float("nan")
        return loss + float("inf") if self.fault("inf with finite gradients") else loss

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        grad = next(model.parameters()).grad.view(-1)
        if self.fault("nan gradient"):
            grad[3] = float("nan")
        if self.fault("inf gradient"):
            grad[3] = -float("inf")
        if self.fault("overflowing norm"):
            grad[:2] = 3e38
        return loss


class Historian(TrainerCallback):
    def __init__(self, run):
        self.run = run

    def on_step_end(self, *args, **kwargs):
        self.run.history.append(everything(innermost(self.run.optimizer)))


FAULTS = {
    2: "nan",
    4: "inf with finite gradients",
    5: "nan gradient",
    7: "inf gradient",
    8: "overflowing norm",
    10: "nan",
    11: "inf gradient",
    12: "nan gradient",
}


def faulty(name, faults, **options):
    hf_optim.register()
    fixed = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 4}
    extra = {"faults": faults, "max_skipped_steps": 3}
    return tiny.trainer(cls=Faulty, extra=extra, optim=name, **{**fixed, **options})


def check_guarded(run, caplog):
    """Three bad steps in a row end the run at step 12; none of the bad ones before leaves a trace."""
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="3 steps in a row(.|\n)*at step 12"):
        run.train()
    assert all(p.isfinite().all() for p in tiny.weights(run))
    assert len(run.history) == 11
    same = {t for t in range(2, 12) if run.history[t - 1] == run.history[t - 2]}
    assert same == FAULTS.keys() - {12} and everything(innermost(run.optimizer)) == run.history[-1]
    assert run.skipped_steps == len(FAULTS)
    for t in range(1, 13):
        assert (f"step {t} skipped" in caplog.text) is (t in FAULTS), t
    logs = [e.get("optim/skipped_steps", 0) for e in run.state.log_history if "learning_rate" in e]
    assert logs == [sum(bad <= t for bad in FAULTS) for t in range(1, 12)]


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(class_name, caplog):
    check_guarded(faulty(class_name, FAULTS, max_steps=20), caplog)


def test_the_guard_finds_the_norm_where_nothing_clips(caplog):
    check_guarded(faulty("adalo", FAULTS, max_steps=20, max_grad_norm=0.0), caplog)


def train_one_of_two_ranks():
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    faults = {2: "inf with finite gradients"} if rank else {4: "inf gradient"}  # seen by one rank alone
    run = faulty("adalo", faults, max_steps=5, ddp_backend="gloo")
    run.train()
    assert run.skipped_steps == 2
    histories = [None, None]
    dist.all_gather_object(histories, run.history)
    assert histories[0] == histories[1]
    assert [a == b for a, b in zip(run.history, run.history[1:])] == [True, False, True, False]


def test_two_ranks_skip_alike():
    launch(2, train_one_of_two_ranks)
