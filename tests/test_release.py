# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient release: steps inside backward are the ordinary steps, and no gradient outlives it."""

import copy

import pytest
import torch
from engine import BF16, apart, everything, flags_on, follows_lr, frozen, rich
from ranks import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import hf_optim


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


@pytest.mark.parametrize("kind", ["plain", "rich", "flags", "stochastic", "kahan", "schedule"])
def test_released_steps_are_the_ordinary_steps(name, kind):
    options = {
        "plain": {},
        "rich": rich(name),
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
