# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient release: steps inside backward are the ordinary steps, and no gradient outlives it."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from engine import BF16, apart, everything, flags_on, follows_lr, frozen, rich
from ranks import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

import hf_optim
from hf_optim.core import FLAGS, release
from hf_optim.optim.sgd import SGD
from hf_optim.run import prepare
from hf_optim.trainer.loss import innermost
from hf_optim.trainer.register import resolve
from hf_optim.trainer.release import handles, releasing
from hf_optim.verdicts import TITLES, Layout, decide


class Model(torch.nn.Module):
    """Linear layers, a norm, a tied weight used twice, a scalar, and a layer that some batches leave out."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 6)
        self.last.weight = torch.nn.Parameter(self.first.weight.detach().t().contiguous())
        self.tied, self.seldom = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.to(dtype)

    def forward(self, x, seldom=False, way=lambda f, x: f(x)):
        x = self.norm(self.first(x))
        x = way(self.tied, way(self.tied, x).tanh())
        if seldom:
            x = x + self.seldom(x)
        return self.last(x) * self.scale


def train(model, optimizer, steps=4, first=1, way=lambda f, x: f(x), after=lambda: None):
    for t in range(first, first + steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t)).to(model.scale.dtype)
        optimizer.zero_grad()
        loss = (model(x, seldom=t % 2 == 0, way=way) - x).square().mean()
        if optimizer.needs_loss:
            optimizer.report_loss(loss)
        loss.backward()
        after()
        optimizer.step()


def create(name, model, **options):
    """Without sums over the model, which are refused (test_sums_over_the_model_are_refused)."""
    return hf_optim.create(name, model, **{**apart(name), **options})


def pair(name, dtype=torch.float32, **options):
    models = [Model(dtype), Model(dtype)]
    return [(m, create(name, m, **options)) for m in models]


@pytest.mark.parametrize("kind", ["plain", "rich", "moved", "flags", "stochastic", "kahan", "schedule"])
def test_released_steps_are_the_ordinary_steps(name, kind):
    options = {
        "plain": {},
        "rich": rich(name),
        "moved": {},
        "flags": flags_on(name),
        "stochastic": {"precision": "stochastic", "state_dtype": "bfloat16"},
        "kahan": {"precision": "kahan"},
        "schedule": follows_lr(name),
    }[kind]
    dtype = BF16 if kind in ("stochastic", "kahan") else torch.float32
    (model, optimizer), (other, released) = pair(name, dtype, **options)
    handle = released.release_gradients()

    def gone():
        assert all(p.grad is None for p in other.parameters())

    plans = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (optimizer, released)]
    for t in range(1, 6):
        train(model, optimizer, 1, first=t)
        train(other, released, 1, first=t, after=gone)
        if kind == "schedule":
            for plan in plans:
                plan.step()
        if kind == "moved":  # to other storage, as by offloading between steps
            for p, state in released.state.items():
                p.data = p.data.clone()
                state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)})
    assert everything(optimizer) == everything(released)  # weights, state and groups, to the last bit
    steps = {n: released.state[p]["step"] for n, p in other.named_parameters()}
    assert steps["seldom.weight"] == 2 and steps["first.weight"] == steps["tied.weight"] == 5
    handle.remove()


def test_the_weights_move_inside_backward(name):
    (model, _), (other, released) = pair(name, lr=0.1)
    released.release_gradients()
    before = frozen(list(other.parameters()))
    x = torch.ones(2, 6)
    loss = other(x).square().mean()
    if released.needs_loss:
        released.report_loss(loss)
    loss.backward()
    inside = frozen(list(other.parameters()))
    assert inside != before
    released.step()
    assert frozen(list(other.parameters())) == inside


def test_a_stray_step_does_nothing(name):
    (model, optimizer), (other, released) = pair(name)
    released.release_gradients()
    released.step()
    for t in range(1, 4):
        train(model, optimizer, 1, first=t)
        train(other, released, 1, first=t)
        before = everything(released)
        released.step()
        released.step()
        assert everything(released) == before
    assert everything(optimizer) == everything(released)


def test_a_second_backward_without_a_step_is_an_error_that_explains(name):
    (_, _), (model, released) = pair(name)
    released.release_gradients()
    train(model, released, 1)
    loss = model(torch.ones(2, 6)).square().mean()
    if released.needs_loss:
        released.report_loss(loss)
    loss.backward()
    with pytest.raises(RuntimeError, match="a second gradient arrived before step.*cannot accumulate.*use_reentrant"):
        model(torch.ones(2, 6)).square().mean().backward()


def test_going_back_by_a_checkpoint_is_not_a_second_backward(name):
    (model, optimizer), (other, released) = pair(name)
    released.release_gradients()
    for m, o in ((model, optimizer), (other, released)):
        train(m, o, 2)
        saved, weights = copy.deepcopy(o.state_dict()), copy.deepcopy(m.state_dict())
        train(m, o, 1, first=3)
        o.load_state_dict(saved)
        m.load_state_dict(weights)
        train(m, o, 3, first=3)
    assert everything(optimizer) == everything(released)


def test_removing_the_hooks_goes_back_to_ordinary_steps(name):
    (model, optimizer), (other, released) = pair(name)
    handle = released.release_gradients()
    with pytest.raises(ValueError, match="released already"):
        released.release_gradients()
    train(other, released, 2)
    handle.remove()
    train(
        other, released, 2, first=3, after=lambda: all(p.grad is not None for p in other.first.parameters()) or 1 / 0
    )
    train(model, optimizer, 4)
    assert everything(optimizer) == everything(released)
    released.release_gradients().remove()  # and once more


@pytest.mark.parametrize("backend", ["loop", "fused"])
def test_a_weight_that_backward_still_needs_is_an_error(backend):
    a, w, x = (torch.randn(8, 8, generator=torch.Generator().manual_seed(i), requires_grad=i < 2) for i in range(3))
    hf_optim.create("stable_decay_sgd", [a, w], backend=backend).release_gradients()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((x @ a @ w.detach()).tanh() @ w).square().mean().backward()


def test_no_hook_looks_at_all_parameters(monkeypatch):
    model, optimizer = pair("adamw")[0]
    optimizer.release_gradients()
    train(model, optimizer, 2)
    seen, real = [], type(optimizer).placed
    monkeypatch.setattr(type(optimizer), "placed", lambda o: seen.append(1) or real(o))
    train(model, optimizer, 1, first=3)
    assert len(seen) <= 1


def test_parameters_cannot_join_while_gradients_are_released(name):
    (_, _), (model, released) = pair(name)
    handle, late = released.release_gradients(), torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="remove.* the gradient release before adding parameters"):
        released.add_param_group({"params": list(late.parameters())})
    handle.remove()
    released.add_param_group({"params": list(late.parameters())})


def test_a_rule_that_needs_all_gradients_is_refused_by_name():
    model = Model()
    optimizer = hf_optim.create("nsgda", model, scope="model")
    with pytest.raises(ValueError, match="NSGDA: norm2, count needs all gradients at once; drop gradient release"):
        optimizer.release_gradients()
    train(model, optimizer, 1)  # nothing was hooked
    mixed = hf_optim.create(
        "nsgda",
        [{"params": list(model.first.parameters())}, *[{"params": list(model.last.parameters()), "scope": "model"}]],
    )
    with pytest.raises(ValueError, match="needs all gradients at once"):
        mixed.release_gradients()


@pytest.mark.parametrize("which", [n for n in hf_optim.list_optimizers() if hf_optim.info(n).needs_loss])
def test_the_loss_must_come_before_backward(which):
    (_, _), (model, released) = pair(which)
    released.release_gradients()
    before = frozen(list(model.parameters()))
    with pytest.raises(RuntimeError, match="needs the loss of this step and got none"):
        model(torch.ones(2, 6)).square().mean().backward()
    assert frozen(list(model.parameters())) == before
    average = released.param_groups[0]["e"].clone()
    model.zero_grad()
    train(model, released, 2)
    assert released.param_groups[0]["step"] == 2 and released.param_groups[0]["e"] != average


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name, reentrant):
    def way(layer, x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    (model, optimizer), (other, released) = pair(name)
    released.release_gradients()
    if reentrant:  # the layer that is used twice gets its gradient in two parts
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            train(other, released, 1, way=way)
        return
    train(model, optimizer, 3, way=way)
    train(other, released, 3, way=way)
    assert everything(optimizer) == everything(released)


def test_frozen_parameters_are_left_apart(name):
    (_, _), (model, released) = pair(name)
    model.first.requires_grad_(False)
    released.release_gradients()
    before = frozen(list(model.first.parameters()))
    train(model, released, 2)
    assert frozen(list(model.first.parameters())) == before
    assert model.first.weight not in released.state


def test_effective_lr_covers_the_whole_step(name):
    (model, optimizer), (other, released) = pair(name)
    released.release_gradients()
    train(model, optimizer, 1)
    train(other, released, 1)
    assert released.effective_lr() == pytest.approx(optimizer.effective_lr(), rel=1e-6)


def test_a_checkpoint_of_a_released_run_is_an_ordinary_one(name):
    (model, optimizer), (other, released) = pair(name, **rich(name))
    released.release_gradients()
    train(other, released, 2)
    optimizer.load_state_dict(copy.deepcopy(released.state_dict()))
    model.load_state_dict(other.state_dict())
    train(model, optimizer, 2, first=3)
    train(other, released, 2, first=3)
    assert everything(optimizer) == everything(released)


# ---- accumulation --------------------------------------------------------------------------------------------------

ABSORBING = ("nsgda", "adalo", "stable_decay_sgd")
MICRO = ((3, True), (5, False), (4, False))  # rows of each micro-batch; `seldom` has no gradient in the last


def accumulate(model, optimizer, steps, handle=None):
    """Steps of several micro-batches. Ordinary ones add up `p.grad`, in fp32."""
    for t in range(steps):
        optimizer.zero_grad()
        losses = []
        for i, (rows, seldom) in enumerate(MICRO):
            draw = torch.Generator().manual_seed(10 * t + i)
            x = torch.randn(rows, 6, generator=draw).to(model.scale.dtype)
            losses.append((model(x, seldom=seldom) - x).square().mean() / len(MICRO))
            last = i == len(MICRO) - 1
            if last and optimizer.needs_loss:
                optimizer.report_loss(sum(loss.detach() for loss in losses))
            with nullcontext() if last or handle is None else handle.accumulate():
                losses[-1].backward()
            assert handle is None or all(p.grad is None for p in model.parameters())
        optimizer.step()


def furthest(model, other):
    return max((p - q).abs().max().item() for p, q in zip(model.parameters(), other.parameters()))


def both_ways(name, steps=4, **options):
    brisk = {"mode": "compliant"} if name == "adalo" else {}  # from the first step on
    (model, optimizer), (other, released) = pair(name, **brisk, **options)
    start = Model()
    accumulate(model, optimizer, steps)
    accumulate(other, released, steps, released.release_gradients())
    assert furthest(model, start) > 1e-4
    for p, q in zip(model.parameters(), other.parameters()):
        assert optimizer.state[p]["step"] == released.state[q]["step"]
    return furthest(model, other)


@pytest.mark.parametrize("which", ABSORBING)
@pytest.mark.parametrize(
    "kind", ["plain", "rich", "decay", "bf16 state", pytest.param("fused", marks=pytest.mark.slow)]
)
def test_accumulated_steps_are_the_ordinary_steps(which, kind):
    key = "beta1" if which == "adalo" else "momentum"
    options = {
        "plain": {},
        "rich": rich(which),
        "decay": {"weight_decay": 0.1, key: 0.5},
        "bf16 state": {"state_dtype": "bfloat16"},
        "fused": {"backend": "fused"},
    }[kind]
    if which == "stable_decay_sgd" and kind == "rich":
        options = {**options, "dampening": 0.5}
    bound = 2e-2 if kind == "bf16 state" else 1e-6  # bf16 averages are known to 1/256 of their size
    assert both_ways(which, lr=0.05, **options) < bound


def test_bf16_weights_accumulate_in_fp32_state():
    """Ordinary accumulation adds up bf16 gradients; this does not."""
    (model, optimizer), (other, released) = pair("adalo", torch.bfloat16, precision="kahan", kappa=0.1)
    accumulate(model, optimizer, 3)
    accumulate(other, released, 3, released.release_gradients())
    assert furthest(model, other) < 2e-2


def test_every_micro_batch_is_rounded_by_noise_of_its_own():
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = SGD([p], lr=0.0, state_dtype="bfloat16", momentum=0.5)
    p.grad = torch.ones(4096)
    optimizer.step()
    optimizer.zero_grad()
    handle, before = optimizer.release_gradients(), optimizer.state[p]["m"].clone()
    for _ in range(8):
        with handle.accumulate():
            (p * 2.0**-11).sum().backward()  # m grows by 2^-10, an eighth of what bf16 can tell apart
    ulps = (optimizer.state[p]["m"].float() - before.float()) * 2**7
    assert ulps.mean() == pytest.approx(1.0, abs=0.08)  # of 8 independent draws: deviation of the mean 0.015
    assert ulps.var() == pytest.approx(8 / 8 * 7 / 8, rel=0.15)  # equal noise would make it 7
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def options_of_flags():
    values = {"denominator": (), "decay": ("cautious", "stable", "cpr", "coupled")}
    one = [{flag: value} for flag in FLAGS for value in values.get(flag, (True,))]
    return [*one, {"centralize": True, "centralize_on": "update"}, {"trust_ratio": True, "trust_on": "gradient"}]


@pytest.mark.parametrize("which", ABSORBING)
def test_flags_act_alike_or_are_refused(which):
    refused = []
    for options in options_of_flags():
        if any(hf_optim.info(which).cls.excluded(key, value) for key, value in options.items()):
            continue
        decay = {} if options.get("decay") == "cpr" else {"weight_decay": 0.1}
        try:
            far = both_ways(which, lr=0.05, **decay, **options)
        except ValueError as error:
            assert "looks at the gradient of the whole step" in str(error)
            refused.append("=".join(map(str, next(iter(options.items())))) + ("*" if len(options) > 1 else ""))
        else:
            assert far < 1e-6, options
    seen = ["centralize=True", "agc=True", "soft_clip=True", "normalize=True", "cautious=True", "decay=coupled"]
    assert set(refused) == {*seen, "trust_ratio=True*"}


def test_what_cannot_accumulate_is_refused_by_name(name):
    (_, _), (model, released) = pair(name)
    handle, before = released.release_gradients(), everything(released)
    message = rf"^{type(released).__name__} cannot accumulate.*AdaLo, (\w+, )*NSGDA, SGD can"
    refused = nullcontext() if name in ABSORBING else pytest.raises(ValueError, match=message)
    with refused, handle.accumulate():
        pass
    train(model, released, 1)
    assert everything(released) != before  # and goes on


@pytest.mark.parametrize("which", ABSORBING)
def test_without_momentum_nothing_can_accumulate(which):
    key = "beta1" if which == "adalo" else "momentum"
    (_, _), (_, released) = pair(which, **{key: 0.0})
    with pytest.raises(ValueError, match="has a decay of 0"):
        released.release_gradients().accumulate().__enter__()


def test_micro_batches_come_before_the_step():
    (_, _), (model, released) = pair("nsgda")
    handle = released.release_gradients()
    model(torch.ones(2, 6)).square().mean().backward()
    with pytest.raises(RuntimeError, match="have moved since the last step"):
        handle.accumulate().__enter__()
    released.step()
    with handle.accumulate():
        pass


def test_skipping_leaves_weights_and_the_next_step_alone(name):
    (model, optimizer), (other, released) = pair(name)
    handle = released.release_gradients()
    train(model, optimizer, 2)
    train(other, released, 2)
    before = frozen(list(other.parameters()))
    handle.skip()
    train(other, released, 1, first=9)
    assert frozen(list(other.parameters())) == before
    if not released.needs_loss:  # the loss of a skipped step does not count either, but here it was reported
        assert everything(optimizer) == everything(released)
    train(model, optimizer, 2, first=3)
    train(other, released, 2, first=3)
    assert everything(optimizer) == everything(released)


def test_what_is_kept_from_step_to_step_is_made_once(monkeypatch):
    made, make = [], release.make_item
    monkeypatch.setattr(release, "make_item", lambda *args: made.append(args[1]) or make(*args))
    (_, _), (model, released) = pair("adalo", cautious=False)
    handle = released.release_gradients()
    accumulate(model, released, 3, handle)
    assert len(made) == len(list(model.parameters()))
    released.param_groups[0]["beta1"] = 0.5
    accumulate(model, released, 1, handle)
    assert len(made) == 2 * len(list(model.parameters()))
    released.load_state_dict(copy.deepcopy(released.state_dict()))
    accumulate(model, released, 1, handle)
    assert len(made) == 3 * len(list(model.parameters()))


# ---- the option ----------------------------------------------------------------------------------------------------


def test_the_option_without_anyone_who_attaches_hooks_is_an_error(name):
    model = Model()
    optimizer = create(name, model, gradient_release=True)
    before = frozen(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"LossAwareTrainer.*hf-optim run SCRIPT.*release_gradients\(\)"):
        train(model, optimizer, 1)
    assert frozen(list(model.parameters())) == before
    handle = optimizer.release_gradients()
    train(model, optimizer, 1)
    handle.remove()
    assert not optimizer.param_groups[0]["gradient_release"]
    train(model, optimizer, 1)


def test_groups_agree_on_the_option():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], **o} for o in ({}, {"gradient_release": True})]
    with pytest.raises(ValueError, match="`gradient_release` must be the same in all groups, got False and True"):
        hf_optim.AdamW(groups)


@pytest.mark.parametrize("here", [False, True])
def test_a_checkpoint_does_not_change_the_option(here, caplog):
    one, two = ([torch.nn.Parameter(torch.ones(2))] for _ in range(2))
    saved = hf_optim.AdamW(one, gradient_release=not here).state_dict()
    optimizer = hf_optim.AdamW(two, gradient_release=here)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["gradient_release"] is here and not caplog.text


def test_checkpoints_that_do_not_know_the_option_load():
    p = torch.nn.Parameter(torch.ones(2))
    saved = hf_optim.AdamW([p]).state_dict()
    del saved["param_groups"][0]["gradient_release"]
    optimizer = hf_optim.AdamW([p], gradient_release=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["gradient_release"] is True


def test_a_scaler_is_refused():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = hf_optim.AdamW([p], gradient_release=True)
    with pytest.raises(ValueError, match="a gradient scaler looks at all gradients before a step"):
        optimizer.step(lambda: p.sum(), scaler=torch.amp.GradScaler("cpu"))
    assert torch.equal(p, torch.ones(2))


def test_gradients_on_other_tensors_are_an_error():
    (_, _), (model, released) = pair("adamw")
    model.first.requires_grad_(False)
    released.release_gradients()
    model.first.requires_grad_(True)
    with pytest.raises(RuntimeError, match="was frozen .* when gradients were released"):
        train(model, released, 1)


def with_gradient(model):
    return sum(p.grad is not None for p in model.parameters())


def test_never_two_gradients_at_a_time(name):
    model, alive = Model(), []
    for p in model.parameters():  # before the hooks of the release, which are then called after these
        p.register_post_accumulate_grad_hook(lambda _: alive.append(with_gradient(model)))
    optimizer = create(name, model)
    optimizer.release_gradients()
    train(model, optimizer, 2)
    assert set(alive) == {1} and len(alive) == 2 * 9 + 2


# ---- Trainer -------------------------------------------------------------------------------------------------------

RELEASE = "gradient_release=true"


@pytest.fixture
def registered():
    hf_optim.register()


def trained(name, cls=None, args="", **options):
    fixed = {"optim": name, "max_grad_norm": 0.0, "max_steps": 3, "learning_rate": 1e-2, "weight_decay": 0.0}
    run = tiny.trainer(cls=cls, **{**fixed, "optim_args": args or None, **options})
    run.train()
    return run


def same(run, other):
    return all(torch.equal(p, q) for p, q in zip(tiny.weights(run), tiny.weights(other)))


def scope(name):
    return {"am_sgd": "scope=tensor", "stable_decay_adamw": "decay=decoupled"}.get(name, "")


def joined(*args):
    return ",".join(filter(None, args))


def released_equals_ordinary(name):
    plain = trained(name, args=scope(name))
    released = trained(name, args=joined(scope(name), RELEASE))
    assert innermost(released.optimizer)._release is not None and same(plain, released)
    for a, b in zip(plain.state.log_history[:-1], released.state.log_history[:-1]):  # the last is the run's time
        # `grad_norm` is in a alone; transformers 5.2 logs it only where it clips
        assert a.pop("grad_norm", 1.0) > 0 and a == pytest.approx(b)


def test_a_released_run_is_the_ordinary_run(registered):
    for name in ("adalo", "muon"):
        released_equals_ordinary(name)


@pytest.mark.slow
def test_a_released_run_is_the_ordinary_run_for_all(name, registered):
    released_equals_ordinary(name)


@pytest.fixture
def runner(monkeypatch):
    """What `hf-optim run` does to the process, until the end of a test."""
    patched = {
        Accelerator: ("backward", "clip_grad_norm_"),
        Trainer: ("create_accelerator_and_postprocess", "log", "train", "_save_checkpoint"),
    }
    for owner, names in patched.items():
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    prepare()


def test_a_stock_trainer_under_the_runner(runner):
    for steps in (1, 3):
        options = {"cls": Trainer, "per_device_train_batch_size": 4, "gradient_accumulation_steps": steps}
        plain, released = trained("adalo", **options), trained("adalo", args=RELEASE, **options)
        assert innermost(released.optimizer)._release is not None
        assert furthest(plain.model, released.model) < 1e-6
        assert not any("grad_norm" in entry for entry in released.state.log_history)


def test_a_stock_trainer_alone_is_stopped_at_its_first_step(registered):
    with pytest.raises(RuntimeError, match="LossAwareTrainer.*hf-optim run"):
        trained("adamw", cls=Trainer, args=RELEASE)


@pytest.mark.parametrize("which", ["nsgda", *(pytest.param(n, marks=pytest.mark.slow) for n in ABSORBING[1:])])
def test_accumulation_in_a_trainer(which, registered):
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "max_steps": 7}  # of 16 batches
    plain, released = trained(which, **options), trained(which, args=RELEASE, **options)
    assert furthest(plain.model, released.model) < 1e-6
    sizes = [[e["optim/effective_lr"] for e in r.state.log_history[:-1]] for r in (plain, released)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, "`max_grad_norm=1.0`: it clips .*set `--max_grad_norm 0`"),
        ({"fp16": True, "use_cpu": False}, "adamw cannot .*the scaler of fp16, .*use bf16"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True`.*--per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 2}, "adamw.*steps=2`: AdamW makes more.*nsgda, adalo, stable_decay_sgd can"),
        ({"optim": "adalo", "args": "cautious=true", "gradient_accumulation_steps": 2}, "`cautious=True` looks at"),
    ],
)
def test_what_cannot_go_with_it_is_refused_before_the_run(registered, options, message):
    fixed = {"optim": "adamw", "max_grad_norm": 0.0, **options}
    fields = {k: v for k, v in fixed.items() if k != "args"}
    run = tiny.arguments(**fields, optim_args=joined(RELEASE, fixed.get("args")))
    with pytest.raises(ValueError, match=message):
        resolve(hf_optim.info(fixed["optim"]), run, None)
    run.optim_args = fixed.get("args")
    resolve(hf_optim.info(fixed["optim"]), run, None)


@pytest.mark.parametrize("kind", TITLES)
def test_layouts(kind):
    options = {"gradient_release": True}
    verdict = decide(hf_optim.AdamW, options, Layout(kind))
    assert verdict.fine == (kind in ("single", "fsdp2"))
    assert verdict.fine or "use FSDP2" in verdict.reason
    scaled = decide(hf_optim.AdamW, options, Layout(kind, fp16=True))
    assert "scaler of fp16" in scaled.reason if verdict.fine else scaled.reason == verdict.reason
    assert decide(hf_optim.AdamW, {}, Layout(kind, fp16=True)).fine == decide(hf_optim.AdamW, {}, Layout(kind)).fine


def test_engines_that_keep_gradients_are_refused_at_the_first_backward():
    optimizer = hf_optim.AdamW([torch.nn.Parameter(torch.ones(2))], gradient_release=True)
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    deepspeed = {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugin": plugin}
    engines = {"AdamW: .*fp16": {"scaler": object()}, "AdamW: .*DeepSpeed ZeRO 3; use FSDP2": deepspeed}
    for message, engine in engines.items():
        known = {"_optimizers": [optimizer], "scaler": None, "distributed_type": DistributedType.NO, **engine}
        with pytest.raises(ValueError, match=message):
            handles(SimpleNamespace(**known))


def test_clipping_is_refused_whoever_asks_for_it(registered):
    """An optimizer that Trainer did not make: its arguments were not looked at."""
    net = tiny.model()
    optimizer = hf_optim.create("adamw", net, gradient_release=True)
    run = tiny.trainer(net=net, extra={"optimizers": (optimizer, None)}, max_steps=1)
    with pytest.raises(ValueError, match="`max_norm=1.0`.*set `--max_grad_norm 0`"):
        run.train()


@pytest.mark.parametrize(("which", "pieces"), [("adamw", 1), ("adalo", 3)])
def test_resuming_a_released_run_is_bit_identical(which, pieces, registered):
    def run(resume=None, **options):
        net = tiny.model(dropout=0.1).bfloat16()
        made = tiny.trainer(
            net=net, optim=which, optim_args=joined(RELEASE, "precision=stochastic,state_dtype=bfloat16"), max_steps=4,
            max_grad_norm=0.0, gradient_accumulation_steps=pieces, **options,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run(save_strategy="steps", save_steps=2)
    assert same(whole, run(resume=f"{whole.args.output_dir}/checkpoint-2"))


def test_gradients_of_a_trainer_never_exist_together(registered):
    net, alive = tiny.model(), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(with_gradient(net)))
    trained("adalo", net=net, args=RELEASE, gradient_accumulation_steps=2, max_steps=2)
    assert set(alive) == {1} and len(alive) == 4 * len(list(net.parameters()))


class Poisoned(hf_optim.LossAwareTrainer):
    bad, count = (), 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.count += 1
        return loss * float("nan") if self.count in self.bad else loss


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_loss_that_is_not_finite_does_not_reach_the_weights(pieces, registered, caplog):
    class Run(Poisoned):
        bad = (2,) if pieces == 1 else (5,)  # of the second step

    moved, made = [], {}

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            moved.append(tiny.weights(made["run"]))

    options = {"optim": "adalo", "optim_args": RELEASE, "max_grad_norm": 0.0, "gradient_accumulation_steps": pieces}
    run = made["run"] = tiny.trainer(cls=Run, max_steps=4, extra={"callbacks": [Watch()]}, **options)
    run.train()
    assert run.skipped_steps == 1 and "step 2 skipped" in caplog.text
    still = [all(torch.equal(p, q) for p, q in zip(a, b)) for a, b in zip(moved, moved[1:])]
    assert still == [True, False, False]
    inner = innermost(run.optimizer)
    assert {state["step"] for state in inner.state.values()} == {3} and inner.param_groups[0]["step"] == 3
    assert all(x.isfinite().all() for x in tiny.weights(run)) and inner.param_groups[0]["e"].isfinite()
    logs = [entry for entry in run.state.log_history if "learning_rate" in entry]
    assert [entry.get("optim/skipped_steps", 0) for entry in logs] == [0, 1, 1, 1]


# ---- several ranks -------------------------------------------------------------------------------------------------


def on_ranks(name):
    plain = Model()
    optimizer = create(name, plain)
    with pytest.raises(ValueError, match="under DDP a gradient is averaged after the hook.*FSDP2"):
        optimizer.release_gradients()
    mesh, models = init_device_mesh("cpu", (2,)), []
    for _ in range(2):
        model = Model()
        model.scale = torch.nn.Parameter(torch.ones(8, 1))  # FSDP2 does not shard scalars
        model.forward = lambda x, model=model, **_: model.last(model.norm(model.first(x)))
        for layer in (model.first, model.last):
            fully_shard(layer, mesh=mesh)
        models.append(fully_shard(model, mesh=mesh))
    (one, two), options = models, rich(name)
    ordinary, released = create(name, one, **options), create(name, two, **options)
    released.release_gradients()
    for t in range(1, 4):
        for model, o in ((one, ordinary), (two, released)):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
            loss = (model(x) - x).square().mean()
            if o.needs_loss:
                o.report_loss(loss)
            loss.backward()
            assert (model.first.weight.grad is None) == (o is released)
            o.step()
            o.zero_grad()
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p.to_local(), q.to_local())
    assert ordinary.state[one.first.weight]["step"] == released.state[two.first.weight]["step"] == 3


def test_released_under_fsdp2_refused_under_ddp(name):
    launch(2, on_ranks, name)


def accumulation_on_ranks(which):
    mesh, found = init_device_mesh("cpu", (2,)), []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 6))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = hf_optim.create(which, list(model.parameters()), lr=0.05, gradient_release=released)
        run = SimpleNamespace(_optimizers=[optimizer], _models=[model], scaler=None, distributed_type=None)
        for t in range(6):
            run.sync_gradients = t % 3 == 2
            model.set_requires_gradient_sync(run.sync_gradients)  # as Trainer's and accelerate's `no_sync` do
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * t + dist.get_rank()))
            loss = (model(x) - x).square().mean() / 3
            if optimizer.needs_loss and run.sync_gradients:
                optimizer.report_loss(loss)
            with releasing(run):
                loss.backward()
            assert not released or not any(p.grad is not None for p in model.parameters())
            if released:  # nor anything that was not reduced yet
                assert all(p._unsharded_param.grad is None for p in of_fsdp(model))
            if run.sync_gradients:
                optimizer.step()
                optimizer.zero_grad()
        found.append([p.to_local().detach() for p in model.parameters()])
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def of_fsdp(model):
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    return [p for group in groups if group is not None for p in group.fsdp_params]


@pytest.mark.parametrize("which", ["nsgda", pytest.param("adalo", marks=pytest.mark.slow)])
def test_accumulation_under_fsdp2(which):
    launch(2, accumulation_on_ranks, which)
