# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters move exactly as whole ones: DTensor and FSDP2 on two and three gloo ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import LAYOUTS, fill_grads, loss_at, make_params, slow_but
from engine import BF16, brisk, flags_on, frozen, moments, rich
from ranks import launch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import hf_optim
from hf_optim.core import sharding


# rows that two and three ranks cannot share evenly, fewer rows than ranks, a vector, a scalar, more axes, nothing
SHAPES = ((5, 4), (1, 6), (7,), (), (3, 2, 2), (0, 3))
MORE_SHAPES = (*SHAPES, (4, 3, 2, 2), (1,), (7, 1), (8, 9))
OWN = {  # options of single optimizers that change what is reduced
    "adafactor_corrected": [{"scale_parameter": True, "relative_step": True, "lr": 1e-3}, {"clip_threshold": 0.5}],
    "amos": [{"clip": 0.5}, {"eta": 0.5}],
    "smmf": [{"beta1": None}],
    "nsgda": [{"scope": "model"}, {"scale": "rms"}],
    "sm3": [{"beta": 0.9}],
    "adalo": [{"mode": "loss"}],
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def place(x, mesh, placements=None):
    placements = placements or [Shard(0)] * mesh.ndim
    if x.ndim == 0:
        placements = [Replicate()] * mesh.ndim
    return distribute_tensor(x.detach().clone(), mesh, placements)  # a replica would alias `x`


def atan2(name):
    return {"denominator": "atan2"} if hf_optim.info(name).cls.uses_ratio else {}


def few(name):
    """(options, dtype of the weights)"""
    stochastic = {"precision": "stochastic", "state_dtype": "bfloat16", **moments(name)}
    return [({}, torch.float32), ({**flags_on(name), **atan2(name)}, torch.float32), (stochastic, BF16)]


def many(name):
    """Every flag alone, every way to keep state, and options that change what is reduced."""
    fp32 = [rich(name), flags_on(name), {"centralize": True}, {"cautious": True, **moments(name)}, *OWN.get(name, [])]
    fp32 += [atan2(name), {"state_dtype": "bfloat16", **moments(name)}]
    if "decay" in hf_optim.info(name).flags:
        fp32.append({"decay": "cautious", "weight_decay": 0.1})
    bf16 = [{"precision": "stochastic"}, {"precision": "kahan"}, {"precision": "kahan", **flags_on(name)}]
    return [(o, torch.float32) for o in fp32] + [(o, BF16) for o in bf16]


def run_both(name, options, dtype, mesh, placements=None, shapes=SHAPES, steps=3, backend="auto"):
    """(optimizer, parameters) of a whole and of a sharded run with the same gradients; the latter on `backend`."""
    plain, start = make_params(shapes, dtype), make_params(shapes, dtype)
    sharded = [torch.nn.Parameter(place(p, mesh, placements)) for p in start]
    options = {**brisk(name), **options}
    one = hf_optim.create(name, plain, **options)
    two = hf_optim.create(name, sharded, **options, backend=backend)
    for t in range(1, steps + 1):
        for p, q, g in zip(plain, sharded, fill_grads(plain, seed=t)):
            q.grad = place(g, mesh, placements)
            if t == 2 and p.shape == (7,):
                p.grad = q.grad = None  # on all ranks alike
        for optimizer in (one, two):
            optimizer.step(loss=loss_at(t) if optimizer.needs_loss else None)
    return one, plain, two, sharded


def compare(label, one, plain, two, sharded, exact):
    """Differences between the runs, as lines of text."""
    found = []
    for p, q in zip(plain, sharded):
        mine, theirs = {"weight": p, **one.state[p]}, {"weight": q, **two.state[q]}
        if set(mine) != set(theirs):
            found.append(f"{label} {tuple(p.shape)}: state {sorted(theirs)}")
            continue
        for key, b in theirs.items():
            a, where = mine[key], f"{label} {tuple(p.shape)} {key}"
            if isinstance(b, DTensor) and any(x.is_partial() for x in b.placements):
                found.append(f"{where}: placements {b.placements}")
            if not isinstance(a, torch.Tensor):
                found += [] if a == b else [f"{where}: {b} instead of {a}"]
                continue
            if not isinstance(b, DTensor):
                found.append(f"{where}: a plain tensor, which a sharded checkpoint keeps of one rank only")
            a, b = a.detach(), whole(b).detach()
            if a.dtype != b.dtype or a.shape != b.shape:
                found.append(f"{where}: {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}")
            elif a.numel() and not torch.equal(a, b):
                own = key == "residual" and not exact  # what a bf16 weight lacks, with 8 bits: 16 in all
                if own:
                    a, b = a.float() + p.detach(), b.float() + whole(q).detach()
                far, size = (a.double() - b.double()).abs(), a.double().abs().max()
                # another order of summation may tip a bf16 number to its neighbour, seldom
                allowed = 1e-6 * (1 + size) + (2.0**-7 if a.dtype == BF16 else 2.0**-16 if own else 0) * size
                rare = a.dtype != BF16 or (far > 0).double().mean() <= max(0.05, 1 / a.numel())
                if exact or far.max() > allowed or not rare:
                    found.append(f"{where}: off by {far.max().item():.2g}")
    return found


def shards_equal_whole(name, variants, shapes):
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for options, dtype in variants:
        label = f"{name} {options} {dtype}"
        one, plain, two, sharded = run_both(name, options, dtype, mesh, shapes=shapes)
        spec = one.spec(one.param_groups[0], plain[0], [{}])
        assert spec.rounding == options.get("precision", "nearest")
        found += compare(label, one, plain, two, sharded, spec.elementwise)
        moved = [(p != q).any() for p, q in zip(plain, make_params(shapes, dtype)) if p.numel()]
        found += [] if all(moved) else [f"{label}: something did not move"]
    assert not found, "\n".join(found)


def test_sharded_equals_whole(second_name):
    launch(2, shards_equal_whole, second_name, [*few(second_name), ({"precision": "kahan"}, BF16)], SHAPES)


@pytest.mark.parametrize("which", slow_but("adalo", "adafactor_corrected", "smmf", "muon"))
def test_sharded_over_three_equals_whole(which):
    launch(3, shards_equal_whole, which, few(which), SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_equals_whole_with_every_option(name, world):
    launch(world, shards_equal_whole, name, few(name) + many(name), MORE_SHAPES)


def other_meshes(name):
    found = []
    meshes = {
        "replicated": (init_device_mesh("cpu", (4,)), [Replicate()]),
        "hybrid": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")), [Replicate(), Shard(0)]),
        "sharded twice": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), [Shard(0), Shard(0)]),
    }
    for kind, (mesh, placements) in meshes.items():
        for options, dtype in few(name)[1:]:
            runs = run_both(name, options, dtype, mesh, placements, ((5, 4), (7,), (2, 2, 2)), steps=2)
            found += compare(f"{name} {kind} {options}", *runs, exact=False)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("which", slow_but("adafactor_corrected"))
def test_meshes_of_two_dimensions(which):
    launch(4, other_meshes, which)


def along_the_second_axis(name):
    mesh, found = init_device_mesh("cpu", (2,)), []
    for options, dtype in (({}, torch.float32), (flags_on(name), torch.float32), ({"precision": "kahan"}, BF16)):
        # matrices only: SMMF's view of more axes as a matrix mixes the sharded one with others
        runs = run_both(name, options, dtype, mesh, [Shard(1)], ((5, 4), (3, 6), (2, 1)), steps=2)
        found += compare(f"{name} {options}", *runs, exact=False)
    assert not found, "\n".join(found)
    # its noise follows the row-major order of the whole parameter, which such a shard does not
    with pytest.raises(NotImplementedError, match="precision='stochastic'.*sharded along dimension 0.*'kahan'"):
        run_both(name, {"precision": "stochastic"}, BF16, mesh, [Shard(1)], ((5, 4),))


@pytest.mark.parametrize("which", slow_but("amos"))
def test_shards_of_the_second_axis(which):
    launch(2, along_the_second_axis, which)


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.LayerNorm(9), torch.nn.Tanh(), torch.nn.Linear(9, 5), torch.nn.Linear(5, 1)
    )


def sharded_model(seed=0):
    model = make_model(seed)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def train(model, optimizer, first, steps, spread=0.0):
    """`steps` steps; with `spread`, every rank has data of its own. Returns the losses."""
    losses = []
    for t in range(first, first + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        if spread:
            x = x + spread * dist.get_rank()
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss if optimizer.needs_loss else None)
        losses.append(loss.detach())
    return losses


def fsdp_equals_one_process(name):
    for options in ({}, flags_on(name)):
        model, plain = sharded_model(), make_model()
        one, two = hf_optim.create(name, plain, **options), hf_optim.create(name, model, **options)
        train(plain, one, 1, 3), train(model, two, 1, 3)
        for (key, p), q in zip(plain.named_parameters(), model.parameters()):
            assert isinstance(q, DTensor)
            far = (p - q.full_tensor()).abs().max().item()
            assert far < 2e-6, f"{name} {options} {key}: off by {far:.2g}"


def asking_is_harmless(name):
    bounded = hf_optim.info(name).preset.get("decay") == "cpr"  # a bound in place of decay
    options = {"lr": 0.5, **({} if bounded else {"weight_decay": 0.5}), **rich(name)}
    model, other = sharded_model(), sharded_model()
    optimizer, reference = hf_optim.create(name, model, **options), hf_optim.create(name, other, **options)
    before = [p.to_local().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)  # makes state by a step, without a loss
    for p, start in zip(model.parameters(), before):
        assert torch.equal(p.to_local(), start)
        assert optimizer.state[p]["step"] == 0 and len(optimizer.state[p]) > 1
    assert optimizer.param_groups[0]["step"] == 0 and optimizer.param_groups[0]["lr"] == 0.5
    train(model, optimizer, 1, 2), train(other, reference, 1, 2)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p.to_local(), q.to_local())


def ranks_agree(name):
    model = sharded_model()
    optimizer = hf_optim.create(name, model)
    losses = train(model, optimizer, 1, 3, spread=1.0)
    values = [torch.empty(()) for _ in range(dist.get_world_size())]
    dist.all_gather(values, losses[-1])
    assert values[0] != values[1]  # the data did differ
    for group in optimizer.param_groups:
        for key in optimizer.shared:
            dist.all_gather(values, group[key])
            assert all(torch.equal(values[0], v) for v in values)
    for p in model.parameters():  # a replicated statistic is the same everywhere
        for value in optimizer.state[p].values():
            if isinstance(value, DTensor) and value.placements[0].is_replicate():
                copies = [torch.empty_like(value.to_local()) for _ in values]
                dist.all_gather(copies, value.to_local().contiguous())
                assert all(torch.equal(copies[0], c) for c in copies)


def fsdp(name):
    fsdp_equals_one_process(name)
    asking_is_harmless(name)
    ranks_agree(name)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", slow_but(*LAYOUTS, "muon", "am_sgd"))
def test_fsdp2(which, world):
    """Equals one process; asking a fresh optimizer for its state changes nothing; ranks agree on what they share."""
    launch(world, fsdp, which)


def resumes(name, kind, folder):
    how = StateDictOptions(full_state_dict=kind == "full", flatten_optimizer_state_dict=kind == "flat")
    settings = {**rich(name), "lr": 0.01}
    model, twin = sharded_model(), sharded_model(seed=1)
    # one group: flattened names of several groups are torch's affair
    optimizer = hf_optim.create(name, list(model.parameters()), **settings)
    fresh = hf_optim.create(name, list(twin.parameters()), **settings)
    train(model, optimizer, 1, 2)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters()):
            p.copy_(q)
    saved = get_optimizer_state_dict(model, optimizer, options=how)
    if kind == "full":
        assert not any(isinstance(v, DTensor) for s in saved["state"].values() for v in s.values())
        saved = copy.deepcopy(saved)
    else:
        dcp.save({"optim": saved}, checkpoint_id=f"{folder}/{kind}")
        template = {"optim": get_optimizer_state_dict(twin, fresh, options=how)}
        dcp.load(template, checkpoint_id=f"{folder}/{kind}")
        saved = template["optim"]
    set_optimizer_state_dict(twin, fresh, saved, options=how)
    for p, q in zip(model.parameters(), twin.parameters()):
        a, b = optimizer.state[p], fresh.state[q]
        assert {k: type(v) for k, v in a.items()} == {k: type(v) for k, v in b.items()}
        for key, v in a.items():
            if isinstance(v, DTensor):
                assert b[key].placements == v.placements, key
            same = frozen([v.to_local(), b[key].to_local()] if isinstance(v, DTensor) else [v, b[key]])
            assert same[0] == same[1], key
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (optimizer, fresh)]
    assert frozen(groups[0]) == frozen(groups[1])
    train(model, optimizer, 3, 2), train(twin, fresh, 3, 2)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p.to_local(), q.to_local())


MORE = [pytest.param(w, kind, marks=pytest.mark.slow) for w, kind in ((2, "flat"), (3, "sharded"), (3, "full"))]


@pytest.mark.parametrize("world, kind", [(2, "sharded"), (2, "full"), *MORE])
@pytest.mark.parametrize("which", slow_but(*LAYOUTS))
def test_distributed_checkpoints_resume_bit_for_bit(which, world, kind, tmp_path):
    launch(world, resumes, which, kind, str(tmp_path))


def whole_into_shards(name):
    mesh = init_device_mesh("cpu", (2,))
    one, plain, two, sharded = run_both(name, rich(name), torch.float32, mesh)
    with torch.no_grad():
        for q in sharded:
            q.zero_()
    two = hf_optim.create(name, sharded)
    two.load_state_dict(one.state_dict())  # the checkpoint of one process: each rank takes its shards
    for p, q in zip(plain, sharded):
        q.grad = place(p, mesh)  # p and q are parted by their weights only
        with torch.no_grad():
            q.copy_(place(p, mesh))
        p.grad = p.detach().clone()
    for optimizer in (one, two):
        optimizer.step(loss=1.0 if optimizer.needs_loss else None)
    found = compare(name, one, plain, two, sharded, exact=False)
    assert not found, "\n".join(found)
    assert all(len(two.state[q]) == len(one.state[p]) > 1 for p, q in zip(plain, sharded))


def test_the_checkpoint_of_one_process_loads_into_shards(name):
    launch(2, whole_into_shards, name)


# ---- the loss ------------------------------------------------------------------------------------------------------

NEEDS_LOSS = [n for n in hf_optim.list_optimizers() if hf_optim.info(n).needs_loss]


def loss_is_averaged(name):
    def weights_after(steps):
        torch.manual_seed(0)
        (p,) = make_params([(4, 3)])
        optimizer = hf_optim.create(name, [p])
        for t in range(1, steps + 1):
            fill_grads([p], seed=t)  # DDP averages the gradients; the losses are different
            optimizer.report_loss(loss_at(t) * (1 + dist.get_rank()))
            optimizer.step()
        everyone = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, p.detach())
        return everyone, optimizer.param_groups[0]["e"]

    everyone, average = weights_after(40)
    assert all(torch.equal(everyone[0], w) for w in everyone[1:])
    (p,) = make_params([(4, 3)])
    one = hf_optim.create(name, [p])
    mean = sum(range(1, dist.get_world_size() + 1)) / dist.get_world_size()
    sharding.mean_over_ranks, kept = lambda x: x, sharding.mean_over_ranks
    for t in range(1, 41):
        fill_grads([p], seed=t)
        one.step(loss=loss_at(t) * mean)
    assert torch.allclose(one.param_groups[0]["e"], average, rtol=1e-6) and torch.allclose(p, everyone[0], rtol=1e-6)
    everyone, _ = weights_after(40)  # without the reduction the ranks drift apart: what this test is here to see
    assert not torch.equal(everyone[0], everyone[1])
    sharding.mean_over_ranks = kept


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("which", NEEDS_LOSS)
def test_all_ranks_step_by_the_mean_of_their_losses(which, world):
    launch(world, loss_is_averaged, which)


# ---- cost ----------------------------------------------------------------------------------------------------------


FACTORED = ("adafactor_corrected", "sm3", "amos", "smmf")


def collectives(name):
    mesh = init_device_mesh("cpu", (2,))
    counts = {}
    for shape in ((6, 4), (6,)):
        for kind, options in (("plain", {}), ("flags", flags_on(name))):
            params = [torch.nn.Parameter(place(p, mesh)) for p in make_params([shape])]
            optimizer = hf_optim.create(name, params, **options)
            for t in (1, 2):
                params[0].grad = place(fill_grads(make_params([shape]), seed=t)[0], mesh)
                with CommDebugMode() as mode:
                    optimizer.step(loss=1.0 if optimizer.needs_loss else None)
            counts[len(shape), kind] = mode.get_total_counts() - optimizer.needs_loss  # the loss is one for them all
    info, plain = hf_optim.info(name), max(counts[2, "plain"], counts[1, "plain"])
    if info.cls.elementwise and all(t.elementwise for t in info.techniques):
        assert plain == (1 if name == "stable_decay_adamw" else 0), counts  # one sum for the whole model
    if name in FACTORED:
        assert plain <= 2, counts
    iterations = 12 if name == "spectral_adamw" else 0  # two matrices, two power iterations, three reductions
    assert plain <= max(6, iterations) and max(counts.values()) <= 12 + iterations, counts


def test_collectives_per_step_are_few(second_name):
    launch(2, collectives, second_name)


def square_matrices():
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="SMMF: `matricize=square` mixes rows, use `rows` under FSDP2"):
        run_both("smmf", {"matricize": "square"}, torch.float32, mesh)


def test_smmf_refuses_square_matrices_of_shards():
    launch(2, square_matrices)
