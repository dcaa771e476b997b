# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What torch, its schedulers and its trainers expect of any optimizer, asked of every one of ours."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import advance, fill_grads, loss_at, make_params
from engine import (
    BF16,
    SHAPES,
    bits,
    brisk,
    build,
    everything,
    flags_on,
    follows_lr,
    frozen,
    moments,
    reloaded,
    rich,
    twin,
)

import hf_optim


KEYS = Path(__file__).parent / "data" / "keys.json"
LAYOUTS = {  # dtype of the weights, and options
    "fp32": (torch.float32, {}),
    "fp64": (torch.float64, {}),
    "bf16": (BF16, {}),
    "fp16": (torch.float16, {}),
    "kahan": (BF16, {"precision": "kahan"}),
    "stochastic": (BF16, {"precision": "stochastic", "seed": 3}),
    "bf16-state": (torch.float32, {"state_dtype": "bfloat16"}),
    "bf16-both": (BF16, {"precision": "kahan", "state_dtype": "bfloat16"}),
}
ODD_SHAPES = (
    (),
    (1,),
    (0,),
    (5,),
    (1, 1),
    (3, 1),
    (1, 4),
    (2, 0, 3),
    (2, 3, 4),
    (1, 3, 1, 2),
    (2, 1, 2, 1, 3),
    (17, 2),
)


def loss_of(optimizer, t=1):
    return loss_at(t) if optimizer.needs_loss else None


def weights(params):
    return frozen(list(params))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_load_continue_equals_going_on(name, layout):
    dtype, options = LAYOUTS[layout]
    optimizer, params = build(name, dtype=dtype, **rich(name), **options)
    advance(optimizer, params, 3)
    new, theirs = twin(optimizer, params)
    assert everything(new) == everything(optimizer)  # every dtype, packed bits too, as it was saved
    advance(optimizer, params, 3, first=4)
    advance(new, theirs, 3, first=4)
    assert everything(new) == everything(optimizer)


def test_state_has_the_dtypes_that_were_asked_for(name):
    for layout, (dtype, options) in LAYOUTS.items():
        optimizer, params = build(name, dtype=dtype, **rich(name), **options)
        advance(optimizer, params, 1)
        slots = optimizer.slots(params[0], optimizer._group_view(optimizer.param_groups[0]))
        state = optimizer.state[params[0]]
        assert set(state) == {"step", *slots}
        for key, slot in slots.items():
            small = options.get("state_dtype") and slot.narrow
            expected = slot.dtype or (torch.float64 if dtype == torch.float64 else BF16 if small else torch.float32)
            assert state[key].dtype == expected, (layout, key)
        assert type(state["step"]) is int and ("residual" in state) == (options.get("precision") == "kahan")


def test_a_loaded_dict_and_the_optimizer_share_nothing(name):
    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 2)
    saved = optimizer.state_dict()
    before = frozen(saved)
    new = hf_optim.create(name, make_params(SHAPES), **rich(name))
    new.load_state_dict(saved)
    advance(new, list(new.parameters()), 2)
    assert frozen(saved) == before  # nor the optimizer that it came from
    new.load_state_dict(saved)
    kept = everything(new)
    for state in saved["state"].values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.fill_(7)
    for group in saved["param_groups"]:
        for value in group.values():
            if isinstance(value, torch.Tensor):
                value.fill_(7)
        group["lr"] = 99.0
    assert everything(new) == kept


def test_loading_leaves_the_given_dict_alone(name):
    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 1)
    saved = reloaded(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["seed"]
    before = frozen(saved)
    optimizer.load_state_dict(saved)
    assert frozen(saved) == before


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("layout", ["fp32", "stochastic"])
def test_copies_continue_identically(name, way, layout):
    dtype, options = LAYOUTS[layout]
    optimizer, params = build(name, dtype=dtype, **rich(name), **options)
    advance(optimizer, params, 3)
    new = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    theirs = list(new.parameters())
    assert everything(new) == everything(optimizer) and not {id(p) for p in theirs} & {id(p) for p in params}
    before = everything(optimizer)
    advance(new, theirs, 3, first=4)
    assert everything(optimizer) == before  # the copy shares no storage with the original
    advance(optimizer, params, 3, first=4)
    assert everything(new) == everything(optimizer)


@pytest.mark.parametrize("when", [0, 2])
def test_a_round_trip_through_its_own_state_dict_changes_nothing(name, when):
    # what accelerate does in prepare(); it replaces the groups and the state by new objects
    optimizer, params = build(name, **rich(name))
    other, theirs = build(name, **rich(name))
    advance(optimizer, params, when)
    advance(other, theirs, when)
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0] is not group
    advance(optimizer, params, 3, first=1 + when)
    advance(other, theirs, 3, first=1 + when)
    assert everything(optimizer) == everything(other)


def test_parameters_swapped_in_the_groups_are_the_ones_that_move(name):
    # accelerate's FSDP2 puts sharded parameters in place of those the optimizer was made with
    optimizer, old = build(name, **rich(name))
    reference, theirs = build(name, seed=5, **rich(name))
    new, before = make_params(SHAPES, seed=5), weights(old)
    optimizer.param_groups[0]["params"] = new
    advance(optimizer, new, 3)
    advance(reference, theirs, 3)
    assert weights(old) == before and everything(optimizer) == everything(reference)


def test_state_moved_to_other_storage_is_followed(name):
    # offloading between steps replaces the tensors inside the state, and `.data` those of the weights
    optimizer, params = build(name, **rich(name))
    other, theirs = build(name, **rich(name))
    for first in (1, 3):
        advance(optimizer, params, 2, first=first)
        advance(other, theirs, 2, first=first)
        for p in params:
            state = optimizer.state[p]
            state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)})
    for p in params:
        p.data = p.data.clone()
    advance(optimizer, params, 2, first=5)
    advance(other, theirs, 2, first=5)
    assert everything(optimizer) == everything(other)


def test_cleared_state_starts_afresh(name):
    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 2)
    optimizer.state.clear()
    advance(optimizer, params, 1, first=3)
    assert {optimizer.state[p]["step"] for p in params if p.numel()} == {1}


def test_state_dicts_are_deterministic(name):
    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 2)
    first, second = optimizer.state_dict(), optimizer.state_dict()
    assert frozen(first) == frozen(second) and list(first["state"]) == list(range(len(SHAPES)))


def test_a_group_key_that_an_older_checkpoint_lacks_gets_its_default(name):
    optimizer, params = build(name, **moments(name))
    advance(optimizer, params, 3)
    saved = reloaded(optimizer.state_dict())
    given = {*moments(name), *hf_optim.info(name).preset, "lr", "optimizer", "step", "params", *optimizer.shared}
    for group in saved["param_groups"]:
        for key in set(group) - given:
            del group[key]
    new = hf_optim.create(name, make_params(SHAPES), **moments(name))
    for p, q in zip(new.parameters(), params):
        p.data.copy_(q)
    new.load_state_dict(saved)
    assert everything(new) == everything(optimizer)
    advance(optimizer, params, 2, first=4)
    advance(new, list(new.parameters()), 2, first=4)
    assert everything(new) == everything(optimizer)


def test_an_older_pickle_gets_defaults_too(name):
    optimizer, params = build(name)
    advance(optimizer, params, 1)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["backend"], group["seed"]
    new = type(optimizer).__new__(type(optimizer))
    new.__setstate__(state)
    assert new.param_groups[0]["backend"] == "auto" and new.param_groups[0]["seed"] == 0


def other_optimizers(name):
    """Checkpoints that must not load: of other rules of ours, and of torch."""
    others = [n for n in hf_optim.list_optimizers() if hf_optim.info(n).cls is not hf_optim.info(name).cls]
    for make in [*(lambda p, n=n: hf_optim.create(n, p) for n in others), torch.optim.AdamW, torch.optim.SGD]:
        params = make_params(SHAPES)
        optimizer = make(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(**({"loss": 1.0} if getattr(optimizer, "needs_loss", False) else {}))
        yield type(optimizer).__name__, optimizer.state_dict()


def refuse_to_load(optimizer, saved, match):
    before, hooks = everything(optimizer), len(optimizer._optimizer_load_state_dict_pre_hooks)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == hooks


def test_checkpoints_of_other_optimizers_are_refused_and_change_nothing(name):
    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 2)
    for owner, saved in other_optimizers(name):
        for p in saved["param_groups"]:
            p["lr"] = 77.0
        what = (
            owner if owner not in ("AdamW", "SGD") or "optimizer" in saved["param_groups"][0] else "another optimizer"
        )
        refuse_to_load(optimizer, saved, f"{type(optimizer).__name__} cannot load this checkpoint.*{what}")
    other, theirs = build(name, **rich(name))
    advance(other, theirs, 2)
    advance(other, theirs, 1, first=3)
    advance(optimizer, params, 1, first=3)
    assert everything(optimizer) == everything(other)  # and training goes on


def test_checkpoints_of_other_models_are_refused_and_change_nothing(name):
    optimizer, params = build(name, [(4, 6), (5,)], **rich(name))
    advance(optimizer, params, 2)
    for shapes in ([(4, 7), (5,)], [(4, 6), (6,)], [(5,), (4, 6)], [(2, 12), (5,)]):
        other, theirs = build(name, shapes, **rich(name))
        advance(other, theirs, 2)
        refuse_to_load(optimizer, other.state_dict(), "cannot load this checkpoint: parameter .* of shape")
    for shapes in ([(4, 6)], [(4, 6), (5,), (5,)]):
        other, theirs = build(name, shapes, **rich(name))
        advance(other, theirs, 2)
        refuse_to_load(optimizer, other.state_dict(), "doesn't match the size")
    a, b = make_params([(4, 6), (5,)])
    other = hf_optim.create(name, [{"params": [a]}, {"params": [b]}], **rich(name))
    advance(other, [a, b], 2)
    refuse_to_load(optimizer, other.state_dict(), "different number of parameter groups")


def test_checkpoints_with_state_missing_or_left_over_are_refused(name):
    optimizer, params = build(name, [(4, 6), (5,)], **rich(name))
    advance(optimizer, params, 2)
    for damage in ("missing", "extra"):
        saved = copy.deepcopy(optimizer.state_dict())
        if damage == "missing":
            del saved["state"][1]["lookahead_slow"]
        else:
            saved["state"][1]["unheard_of"] = torch.zeros(5)
        refuse_to_load(optimizer, saved, "parameter 1 of shape")


def test_options_of_the_checkpoint_win_and_are_told(name, caplog):
    optimizer, params = build(name, lookahead=True, lookahead_k=3, lr=0.25)
    advance(optimizer, params, 1)
    new = hf_optim.create(name, make_params(SHAPES), lookahead=False)
    new.load_state_dict(optimizer.state_dict())
    group = new.param_groups[0]
    assert (group["lookahead"], group["lookahead_k"], group["lr"]) == (True, 3, 0.25)
    assert "`lookahead` True (not False)" in caplog.text and "`lookahead_k` 3 (not 5)" in caplog.text
    assert "`lr`" not in caplog.text  # schedules change it


def key_sets(name):
    """The keys a checkpoint consists of: of a group, and of the state of parameters of 0 to 4 dimensions."""
    found = {}
    for kind, options in {"default": {}, "rich": rich(name), "kahan": {"precision": "kahan"}}.items():
        optimizer, params = build(name, [(), (3,), (3, 2), (2, 3, 2), (2, 1, 3, 2)], dtype=BF16, **options)
        advance(optimizer, params, 1)
        groups = optimizer.state_dict()["param_groups"]
        found[kind] = {str(p.ndim): sorted(optimizer.state[p]) for p in params}
        found["group"] = sorted(groups[0])
    return found


def test_keys_of_checkpoints_are_frozen(name):
    known = json.loads(KEYS.read_text())
    if name not in known:
        pytest.skip(f"not released yet; `python {Path(__file__).name}` freezes the keys of a release")
    assert key_sets(name) == known[name], (
        "the keys of a checkpoint changed: sharded checkpoints of the last release would no longer load. If that is "
        f"meant, delete the entry from {KEYS.name}, run `python {Path(__file__).name}` and say so in the release notes"
    )


def test_no_frozen_optimizer_is_gone():
    assert set(json.loads(KEYS.read_text())) <= set(hf_optim.list_optimizers())


# ---- groups and schedules ------------------------------------------------------------------------------------------


def test_a_group_that_joins_later_has_its_own_clock(name):
    optimizer, params = build(name, [(4, 6), (5,)], **rich(name))
    alone, theirs = build(name, [(4, 6), (5,)], **rich(name))
    advance(optimizer, params, 3)
    advance(alone, theirs, 3)
    late = make_params([(3, 2), (4,)], seed=9)
    optimizer.add_param_group({"params": late, "lr": 0.5})
    fresh = hf_optim.create(name, make_params([(3, 2), (4,)], seed=9), lr=0.5, **rich(name))
    for t in (4, 5):
        fill_grads(params, t), fill_grads(theirs, t), fill_grads(late, t + 50)
        fill_grads(list(fresh.parameters()), t + 50)
        for o in (optimizer, alone, fresh):
            o.step(loss=loss_of(o, t))
    assert weights(params) == weights(theirs)
    assert [optimizer.state[p]["step"] for p in [*params, *late]] == [5, 5, 2, 2]
    first, second = optimizer.param_groups
    assert second["step"] == first["step"] == 5
    if not optimizer.shared:  # what belongs to the whole optimizer is older than the group
        assert weights(late) == weights(fresh.parameters())
    assert all(torch.equal(first[key], second[key]) for key in optimizer.shared)


def test_named_parameters(name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    optimizer = hf_optim.info(name).cls(model.named_parameters())
    other = hf_optim.info(name).cls(plain.parameters())
    for o in (optimizer, other):
        advance(o, list(o.parameters()), 2)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert weights(model.parameters()) == weights(plain.parameters())
    other.load_state_dict(reloaded(optimizer.state_dict()))
    optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    for o in (optimizer, other):
        advance(o, list(o.parameters()), 2, first=3)
    assert weights(model.parameters()) == weights(plain.parameters())


@pytest.mark.parametrize("split", ["reversed", "two groups", "a group each"])
def test_order_and_grouping_change_nothing(name, split):
    optimizer, params = build(name, **flags_on(name))
    theirs = make_params(SHAPES)
    groups = {
        "reversed": [{"params": theirs[::-1]}],
        "two groups": [{"params": theirs[::2]}, {"params": theirs[1::2]}],
        "a group each": [{"params": [p]} for p in theirs],
    }[split]
    other = hf_optim.create(name, groups, **flags_on(name))
    advance(optimizer, params, 4)
    advance(other, theirs, 4)
    assert weights(params) == weights(theirs)


def test_dtypes_beside_each_other_do_not_matter(name):
    dtypes = [torch.float16, torch.float32, BF16, torch.float64]
    alone = []
    for dtype in dtypes:
        optimizer, params = build(name, [(4, 6), (5,)], dtype=dtype, **flags_on(name))
        advance(optimizer, params, 3)
        alone.append(weights(params))
    for order in (dtypes, dtypes[::-1]):
        sets = {dtype: make_params([(4, 6), (5,)], dtype) for dtype in order}
        optimizer = hf_optim.create(name, [p for params in sets.values() for p in params], **flags_on(name))
        for t in (1, 2, 3):
            for params in sets.values():
                fill_grads(params, seed=t)
            optimizer.step(loss=loss_of(optimizer, t))
        assert [weights(sets[dtype]) for dtype in dtypes] == alone


def test_the_learning_rate_of_the_group_counts(name):
    options = {**follows_lr(name), **({"tau": None} if name == "spectral_adamw" else {})}  # bounded, lr is not all
    optimizer, params = build(name, lr=0.5, **options)
    other, theirs = build(name, lr=0.5, **options)
    for o in (optimizer, other):
        o.param_groups[0]["initial_lr"] = 0.5
    other.param_groups[0]["lr"] = 0.25
    start = make_params(SHAPES)
    advance(optimizer, params, 1)
    advance(other, theirs, 1)
    assert weights(params) != weights(theirs)
    if name != "amos":  # its steps are not proportional to lr, nor is it a multiple of lr that decays the weights
        for p, q, s in zip(params, theirs, start):
            assert torch.allclose(p - s, 2 * (q - s), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_schedulers_drive_it(name, kind):
    def scheduler(optimizer):
        if kind == "LambdaLR":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
        if kind == "OneCycleLR":
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=6, cycle_momentum=False)
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)

    def run(schedule):
        optimizer, params = build(name, lr=0.125, **follows_lr(name))
        plan = scheduler(optimizer)
        used = []
        for t in range(1, 5):
            if schedule is not None:
                optimizer.param_groups[0]["lr"] = schedule[t - 1]
            used.append(optimizer.param_groups[0]["lr"])
            advance(optimizer, params, 1, first=t)
            plan.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
        return used, weights(params)

    used, moved = run(None)
    assert len(set(used)) > 1 and all(type(lr) is float for lr in used)
    assert run(used)[1] == moved
    assert run([used[0]] * 4)[1] != moved or kind == "ReduceLROnPlateau"


@pytest.mark.parametrize("layout", ["fp32", "bf16", "kahan", "stochastic"])
def test_a_first_step_of_size_zero_moves_nothing_but_the_state(name, layout):
    dtype, options = LAYOUTS[layout]
    options = {**options, **flags_on(name), **follows_lr(name)}
    if "relative_step" in hf_optim.info(name).options:
        options["relative_step"] = True
    optimizer, params = build(name, dtype=dtype, **options)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t > 0))  # linear warm-up starts at 0
    assert optimizer.param_groups[0]["lr"] == 0 and optimizer.param_groups[0]["initial_lr"] > 0
    before = weights(params)
    advance(optimizer, params, 1)
    assert weights(params) == before
    for p in params:
        state = optimizer.state[p]
        assert state["step"] == (1 if p.numel() else 0)
        if p.numel():
            buffers = [v for k, v in state.items() if k not in ("step", "lookahead_slow", "residual")]
            assert any(b.any() for b in buffers)


def test_a_step_of_zero_gradients_and_zero_lr_only_makes_state(name):
    # torch.distributed.checkpoint makes state this way, and gives no loss
    optimizer, params = build(name, lr=0.5, **rich(name))
    other, theirs = build(name, lr=0.5, **rich(name))
    before = weights(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure=None)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.zero_grad()
    assert weights(params) == before and optimizer.param_groups[0]["step"] == 0
    assert [optimizer.state[p]["step"] for p in params] == [0] * len(params)
    advance(optimizer, params, 3)
    advance(other, theirs, 3)
    assert everything(optimizer) == everything(other)


# ---- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [False, True])
def test_every_shape_and_dtype_moves_and_stays_finite(name, flags):
    options = {**flags_on(name), "lookahead": False} if flags else {}  # alone in a row, weights could return to `slow`
    for dtype in (torch.float32, BF16, torch.float16, torch.float64):
        params, start = make_params(ODD_SHAPES, dtype), make_params(ODD_SHAPES, dtype)
        optimizer = hf_optim.create(name, params, **brisk(name), **options)
        advance(optimizer, params, 4)
        for p, s in zip(params, start):
            assert p.dtype == dtype and p.isfinite().all()
            assert p.numel() == 0 or (p != s).any(), (tuple(p.shape), dtype)
    for shape in ODD_SHAPES:  # alone, too
        optimizer, params = build(name, [shape], **options)
        advance(optimizer, params, 2)
        assert params[0].isfinite().all()


def test_a_model_in_fp64_is_not_rounded_to_fp32(name):
    runs = {}
    for dtype in (torch.float64, torch.float32):
        optimizer, params = build(name, [(4, 6), (5,)], dtype=dtype, weight_decay=0.1)
        advance(optimizer, params, 3)
        runs[dtype] = params
        state = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        assert {v.dtype for v in state if v.dtype.is_floating_point} == {dtype}
    for p, q in zip(runs[torch.float64], runs[torch.float32]):
        assert torch.allclose(p.float(), q, rtol=1e-4, atol=1e-5) and (p != p.float().double()).any()


@pytest.mark.parametrize("layout", ["fp32", "kahan"])
def test_gradients_are_left_alone(name, layout):
    dtype, options = LAYOUTS[layout]
    optimizer, params = build(name, dtype=dtype, **flags_on(name), **options)
    for t in (1, 2):
        grads = fill_grads(params, seed=t)
        before, places = frozen(grads), [g.data_ptr() for g in grads]
        optimizer.step(loss=loss_of(optimizer))
        assert all(p.grad is g for p, g in zip(params, grads))
        assert frozen(grads) == before and [g.data_ptr() for g in grads] == places


def test_no_random_numbers_are_drawn_from_torch(name):
    optimizer, params = build(name, dtype=BF16, precision="stochastic", state_dtype="bfloat16")
    fill_grads(params, seed=1)
    before = torch.get_rng_state()
    for _ in range(2):
        optimizer.step(loss=loss_of(optimizer))
    assert torch.equal(torch.get_rng_state(), before)


def test_state_does_not_grow(name):
    def size():
        state = {
            k: v.shape if isinstance(v, torch.Tensor) else 0 for p in params for k, v in optimizer.state[p].items()
        }
        return state, len(optimizer.state), sorted(optimizer.param_groups[0]), sorted(vars(optimizer))

    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 1)
    first = size()
    advance(optimizer, params, 9, first=2)
    assert size() == first


def test_without_any_gradient_a_step_does_nothing(name):
    optimizer, params = build(name, weight_decay=0.5)
    before = everything(optimizer)
    optimizer.step()  # no loss is asked for either
    assert everything(optimizer) == before and not optimizer.state
    advance(optimizer, params, 2)
    optimizer.zero_grad()
    before = everything(optimizer)
    optimizer.step()
    assert everything(optimizer) == before


def test_zero_gradients_do_not_move_weights(name):
    optimizer, params = build(name)
    for p in params:
        p.grad = torch.zeros_like(p)
    before = weights(params)
    for t in (1, 2):
        optimizer.step(loss=loss_of(optimizer, t))
    assert weights(params) == before
    assert all(v.isfinite().all() for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))


def test_a_parameter_without_gradient_stands_still_in_time(name):
    optimizer, params = build(name, [(4, 6), (5,)], weight_decay=0.1, **rich(name))
    other, theirs = build(name, [(4, 6), (5,)], weight_decay=0.1, **rich(name))
    clocks = []
    for t in range(1, 6):
        fill_grads(params, seed=t)
        if t in (1, 3):
            params[1].grad = None
            before = frozen([params[1], optimizer.state[params[1]]]) if t > 1 else weights([params[1]])
        optimizer.step(loss=loss_of(optimizer))
        if t in (1, 3):
            after = frozen([params[1], optimizer.state[params[1]]]) if t > 1 else weights([params[1]])
            assert after == before
        else:  # the same gradients without a gap
            fill_grads(theirs, seed=t)
            other.step(loss=loss_of(other))
        clocks.append([optimizer.state[p]["step"] for p in params])
    assert clocks == [[1, 0], [2, 1], [3, 1], [4, 2], [5, 3]]
    if not optimizer.shared:
        assert frozen([params[1], optimizer.state[params[1]]]) == frozen([theirs[1], other.state[theirs[1]]])


def test_state_is_made_for_all_that_train_and_for_nothing_else(name):
    optimizer, params = build(name, [(4,), (3,), (2, 2)])
    params[2].requires_grad_(False)
    fill_grads(params[:1], seed=1)
    optimizer.step(loss=loss_of(optimizer))
    assert [p in optimizer.state for p in params] == [True, True, False]
    params[2].requires_grad_(True)  # unfrozen
    advance(optimizer, params, 1, first=2)
    assert [optimizer.state[p]["step"] for p in params] == [2, 1, 1]
    params[2].requires_grad_(False)  # frozen again, its gradient gone: stays
    before = weights(params[2:])
    optimizer.zero_grad()
    advance(optimizer, params[:2], 1, first=3)
    assert weights(params[2:]) == before


def test_a_gradient_left_on_a_frozen_parameter_is_used_as_by_torch(name):
    optimizer, params = build(name, [(4,), (3,)])
    fill_grads(params, seed=1)
    params[1].requires_grad_(False)
    before = weights(params[1:])
    optimizer.step(loss=loss_of(optimizer))
    assert weights(params[1:]) != before


def test_zero_grad(name):
    optimizer, params = build(name)
    fill_grads(params, seed=1)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    fill_grads(params, seed=1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_closures_run_once_with_gradients_and_their_value_is_returned(name):
    optimizer, params = build(name, [(4, 6)])
    other, theirs = build(name, [(4, 6)])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = params[0].square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        result = optimizer.step(closure)
    assert calls == [True] and result.requires_grad
    loss = theirs[0].square().mean()
    loss.backward()
    assert other.step(loss=loss) is None
    assert everything(optimizer) == everything(other) and loss == result


@pytest.mark.parametrize("kind", ["transposed", "channels_last", "sliced", "expanded", "transposed gradient"])
def test_strides_change_nothing(name, kind):
    shape = (3, 4, 2, 2) if kind == "channels_last" else (6, 4)
    (start,) = make_params([shape])
    with torch.no_grad():
        plain = torch.nn.Parameter(start.clone())
        if kind == "transposed":
            odd = torch.nn.Parameter(start.t().contiguous().t())
        elif kind == "sliced":
            odd = torch.nn.Parameter(torch.stack([start, start], -1)[..., 0])
        elif kind == "channels_last":
            odd = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
        else:
            odd = torch.nn.Parameter(start.clone())
    assert odd.is_contiguous() == (kind in ("expanded", "transposed gradient"))
    one, two = hf_optim.create(name, [plain], **flags_on(name)), hf_optim.create(name, [odd], **flags_on(name))
    for t in (1, 2, 3):
        fill_grads([plain], seed=t)
        if kind == "expanded":
            plain.grad = plain.grad[:1].expand(6, 4).contiguous()
            odd.grad = plain.grad[:1].expand(6, 4)
        elif kind == "transposed gradient" and t > 1:  # and another layout than at the step before
            odd.grad = plain.grad.t().contiguous().t()
        else:
            odd.grad = torch.empty_like(odd).copy_(plain.grad)
        one.step(loss=loss_of(one, t))
        two.step(loss=loss_of(two, t))
        assert torch.allclose(plain, odd, rtol=0, atol=1e-6)
    assert odd.stride() == (odd.stride() if kind == "sliced" else two.state[odd]["lookahead_slow"].stride())


def test_sparse_gradients_are_refused_by_name(name):
    for dense_steps in (0, 1):
        optimizer, params = build(name, [(4, 6), (5, 2)])
        advance(optimizer, params, dense_steps)
        fill_grads(params, seed=5)
        params[1].grad = params[1].grad.to_sparse()
        before = weights(params)
        needed = f"{type(optimizer).__name__} needs dense gradients, got torch.sparse_coo: .*sparse=False"
        with pytest.raises(RuntimeError, match=needed):
            optimizer.step(loss=loss_of(optimizer))
        assert weights(params) == before


def test_the_default_dtype_of_torch_does_not_matter(name):
    # loading a model switches it for a while; an optimizer made then must not keep scalars in bf16
    def run():
        optimizer, params = build(name, **flags_on(name))
        advance(optimizer, params, 5)
        return everything(optimizer)

    expected = run()
    try:
        for dtype in (BF16, torch.float64):
            torch.set_default_dtype(dtype)
            assert run() == expected
    finally:
        torch.set_default_dtype(torch.float32)


# ---- hooks ---------------------------------------------------------------------------------------------------------


def test_step_hooks_run_around_the_step(name):
    optimizer, params = build(name, [(4,)])
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", bits(params[0]), kwargs)))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", bits(params[0]), kwargs)))
    before = bits(params[0])
    advance(optimizer, params, 1)
    assert [(kind, value) for kind, value, _ in seen] == [("pre", before), ("post", bits(params[0]))]
    assert before != bits(params[0])
    handle.remove()
    advance(optimizer, params, 1)
    assert [kind for kind, *_ in seen] == ["pre", "post", "pre"]


def test_state_dict_hooks_run_and_may_replace_the_dict(name):
    optimizer, params = build(name)
    advance(optimizer, params, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1 and seen == ["pre"]


def test_load_hooks_run_and_the_dict_they_return_is_loaded(name):
    layout = {"dtype": BF16, "precision": "kahan"}
    optimizer, params = build(name, **layout, **rich(name))
    advance(optimizer, params, 1)
    wanted, theirs = build(name, seed=1, **layout, **rich(name))
    advance(wanted, theirs, 3, scale=2.0)
    seen = []

    def swap(_, given):
        seen.append("pre")
        return copy.deepcopy(wanted.state_dict())

    optimizer.register_load_state_dict_pre_hook(swap)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(frozen(o.state_dict())))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", frozen(wanted.state_dict())]  # the post-hook saw what was loaded, in its own dtypes
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


# ---- the loss ------------------------------------------------------------------------------------------------------

NEEDS_LOSS = [n for n in hf_optim.list_optimizers() if hf_optim.info(n).needs_loss]


@pytest.mark.parametrize("which", NEEDS_LOSS)
def test_a_missing_loss_is_an_error_that_says_how_to_give_it(which):
    optimizer, params = build(which)
    advance(optimizer, params, 1)
    fill_grads(params, seed=2)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="needs the loss") as excinfo:
        optimizer.step()
    for way in ("optimizer.step(loss=loss)", "report_loss(loss)", "LossAwareTrainer", "hf-optim run"):
        assert way in str(excinfo.value)
    assert everything(optimizer) == before


@pytest.mark.parametrize("which", NEEDS_LOSS)
def test_every_way_to_give_the_loss_is_the_same(which):
    def run(way):
        optimizer, params = build(which)
        for t in (1, 2):
            fill_grads(params, seed=t)
            loss = torch.tensor(loss_at(t), requires_grad=True) if way != "float" else loss_at(t)
            if way == "reported":
                optimizer.report_loss(99.0)  # replaced by the next call
                optimizer.report_loss(loss)
                optimizer.step()
            elif way == "closure":
                optimizer.step(lambda loss=loss: loss)
            elif way == "one element":
                optimizer.step(loss=loss.reshape(1, 1))
            elif way == "fp64":
                optimizer.step(loss=loss.double())
            else:
                optimizer.step(loss=loss)
        assert not optimizer.param_groups[0]["e"].requires_grad
        return everything(optimizer)

    expected = run("float")
    for way in ("tensor", "reported", "closure", "one element"):
        assert run(way) == expected


@pytest.mark.parametrize("which", NEEDS_LOSS)
def test_a_loss_counts_for_one_step_only(which):
    optimizer, params = build(which)
    fill_grads(params, seed=1)
    optimizer.report_loss(1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="needs the loss"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.report_loss(1.0)
    optimizer.step()  # nothing moves, and the loss of that batch must not wait for the next one
    fill_grads(params, seed=1)
    with pytest.raises(RuntimeError, match="needs the loss"):
        optimizer.step()


@pytest.mark.parametrize("which", NEEDS_LOSS)
def test_a_loss_must_be_one_number(which):
    optimizer, _ = build(which)
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got shape \(2,\)"):
        optimizer.report_loss(torch.ones(2))


def test_optimizers_that_do_not_ask_for_a_loss_accept_one(name):
    optimizer, params = build(name)
    other, theirs = build(name)
    fill_grads(params, seed=1), fill_grads(theirs, seed=1)
    optimizer.step(loss=loss_at(1))
    if not optimizer.needs_loss:
        other.step()
        assert everything(optimizer) == everything(other)


@pytest.mark.parametrize("how", ["scaler.step", "step(scaler=)"])
def test_a_skipped_step_leaves_no_trace(name, how):
    # fp16: the scaler skips a step with an inf; the run must equal one in which that batch never was
    def run(batches):
        optimizer, params = build(name, [(4, 6), (5,)])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        for t in batches:

            def loss_fn(t=t):
                bad = float("inf") if t == 3 else 1.0
                return sum((p * bad * t).square().mean() for p in params)

            optimizer.zero_grad()
            if how == "step(scaler=)":
                optimizer.step(loss_fn, scaler=scaler)
            else:
                loss = loss_fn()
                scaler.scale(loss).backward()
                if optimizer.needs_loss:
                    optimizer.report_loss(loss)
                scaler.step(optimizer)
            scaler.update()
        return everything(optimizer), scaler.get_scale()

    with_skip, scale = run([1, 2, 3, 4])
    without, full_scale = run([1, 2, 4])
    assert (scale, full_scale) == (2.0, 4.0)  # it was skipped
    assert with_skip == without


def test_a_scaler_needs_a_closure(name):
    optimizer, params = build(name)
    fill_grads(params, seed=1)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(scaler=torch.amp.GradScaler("cpu"))


def test_effective_lr(name):
    optimizer, params = build(name, [(4, 6), (5,)], lr=0.25)
    assert optimizer.effective_lr() is None
    advance(optimizer, params, 2)
    used = optimizer.effective_lr()
    assert used > 0
    if not optimizer.returns_lr:
        assert used == 0.25
    if optimizer.needs_loss:
        e = float(optimizer.param_groups[0]["e"])
        assert used == pytest.approx(e / optimizer.param_groups[0]["kappa"])


def test_it_can_be_printed(name):
    optimizer, _ = build(name)
    text = repr(optimizer)
    assert type(optimizer).__name__ in text and "lr:" in text


if __name__ == "__main__":  # adds optimizers that are not frozen yet, changes no entry
    stored = json.loads(KEYS.read_text()) if KEYS.exists() else {}
    stored = {n: stored.get(n) or key_sets(n) for n in hf_optim.list_optimizers()}
    KEYS.parent.mkdir(exist_ok=True)
    KEYS.write_text(json.dumps(stored, indent=1) + "\n")
