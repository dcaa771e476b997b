# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The rest of what is asked of every optimizer: inputs of every form, contexts it may run in, hooks, groups, symmetry.

test_conformance.py has the first part. `python tests/count_conformance.py` counts both, name by name.
"""

import contextlib
import copy
import math
import pickle
import threading
import warnings
import weakref

import count_conformance
import pytest
import torch
from conftest import advance, fill_grads, loss_at, make_params
from engine import BF16, SHAPES, apart, build, everything, flags_on, follows_lr, frozen, moments, reloaded, rich, twin
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hf_optim
from hf_optim.optim import fractional_adamw


TWO = ((4, 6), (5,))


def loss_of(optimizer, t=1):
    return loss_at(t) if optimizer.needs_loss else None


def pair(name, shapes=SHAPES, **options):
    """Two equal optimizers, each with its parameters."""
    return *build(name, shapes, **options), *build(name, shapes, **options)


def same(a, b):
    return frozen(list(a)) == frozen(list(b))


def seeded_grad(p, t):
    """A gradient for `p` that has not been put on it."""
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(t))


# ---- the count -----------------------------------------------------------------------------------------------------


def test_every_name_passes_a_hundred_checks_and_few_are_not_applicable(name):
    checks, skipped = count_conformance.applicable(name), count_conformance.not_applicable(name)
    assert len(checks) >= 100
    assert len(skipped) <= 5 and all(skipped.values())


def test_a_check_that_may_stop_early_says_for_whom():
    early = {check for check, function in count_conformance.functions().items() if count_conformance.stops(function)}
    declared = {*count_conformance.NOT_APPLICABLE, *count_conformance.BRANCHES}
    assert early == declared, f"count_conformance.py must say why: {sorted(early ^ declared)}"


# ---- ways to give parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["generator", "tuple", "dict view", "group of one tensor", "empty group beside"])
def test_parameters_may_come_in_any_ordered_form(name, form):
    params, theirs = make_params(TWO), make_params(TWO)
    optimizer = hf_optim.create(name, params)
    given = {
        "generator": (p for p in theirs),
        "tuple": tuple(theirs),
        "dict view": dict(enumerate(theirs)).values(),
        "group of one tensor": [{"params": p} for p in theirs],
        "empty group beside": [{"params": []}, {"params": theirs}],
    }[form]
    other = hf_optim.create(name, given)
    advance(optimizer, params, 3)
    advance(other, theirs, 3)
    assert same(params, theirs)


def test_sets_empty_generators_and_things_that_are_no_tensor_are_refused(name):
    cls = hf_optim.info(name).cls
    with pytest.raises(TypeError, match="ordered"):
        cls([{"params": set(make_params(TWO))}])
    with pytest.raises(ValueError, match="empty parameter list"):
        cls(p for p in ())
    for bad in ([1.0, 2.0], ["weight"], 3):
        with pytest.raises(TypeError):
            cls(bad)


def test_half_named_parameters_are_refused(name):
    a, b = make_params(TWO)
    with pytest.raises((ValueError, TypeError)):
        hf_optim.create(name, [("a", a), b])
    with pytest.raises(ValueError, match="names"):
        hf_optim.create(name, [{"params": [("a", a)]}, {"params": [b]}])


def test_a_parameter_twice_in_a_group_is_warned_of(name):
    (p,) = make_params([(3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        hf_optim.create(name, [p, p])


def test_a_parameter_of_another_group_cannot_join(name):
    optimizer, params = build(name, TWO)
    advance(optimizer, params, 1)
    before = everything(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    assert everything(optimizer) == before and len(optimizer.param_groups) == 1
    advance(optimizer, params, 1, first=2)


def test_leaves_that_are_no_parameters_are_stepped_alike(name):
    params = make_params(TWO)
    leaves = [p.detach().clone().requires_grad_() for p in params]
    optimizer, other = hf_optim.create(name, params), hf_optim.create(name, leaves)
    advance(optimizer, params, 3)
    advance(other, leaves, 3)
    assert same(params, leaves)


def test_tied_weights_are_one_parameter(name):
    tied, plain = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    plain.load_state_dict(tied.state_dict())
    model = torch.nn.ModuleList([tied, torch.nn.Linear(4, 4, bias=False)])
    model[1].weight = tied.weight
    optimizer, other = hf_optim.create(name, list(model.parameters())), hf_optim.create(name, [plain.weight])
    x = torch.eye(4)
    for t in (1, 2, 3):
        for o, loss in ((optimizer, model[1](model[0](x)).sum()), (other, plain(plain(x)).sum())):
            o.zero_grad()
            loss.backward()
            o.step(loss=loss_of(o, t))
    assert len(optimizer.state) == 1 and same([tied.weight], [plain.weight])


def test_built_from_a_model_every_trainable_parameter_is_taken_once(name):
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    optimizer = hf_optim.create(name, model)
    found = sorted(id(p) for p in optimizer.parameters())
    assert found == sorted(id(p) for p in (model[0].weight, model[1].weight))


def test_keywords_of_torch_that_do_not_apply_are_refused(name):
    for key in ("foreach", "fused", "capturable", "differentiable", "maximize", "betas", "params_"):
        with pytest.raises(TypeError, match=f"unknown option `{key}`"):
            hf_optim.create(name, make_params(TWO), **{key: True})


# ---- groups --------------------------------------------------------------------------------------------------------


def test_a_group_added_before_the_first_step_equals_one_given_at_construction(name):
    options = {"lr": 0.25, "seed": 3}
    a, b = make_params(TWO), make_params(TWO)
    optimizer = hf_optim.create(name, [{"params": a[:1]}, {"params": a[1:], **options}])
    other = hf_optim.create(name, b[:1])
    other.add_param_group({"params": b[1:], **options})
    assert frozen(optimizer.state_dict()) == frozen(other.state_dict())
    advance(optimizer, a, 3)
    advance(other, b, 3)
    assert everything(optimizer) == everything(other)


def test_a_group_that_is_refused_changes_nothing(name):
    optimizer, params = build(name, TWO)
    other, theirs = build(name, TWO)
    bad = [{"params": make_params(TWO), "lr": -1.0}, {"params": make_params(TWO), "unheard_of": 1}, {"lr": 0.1}]
    for group in bad:
        with pytest.raises((ValueError, TypeError, KeyError)):
            optimizer.add_param_group(group)
    advance(optimizer, params, 2)
    advance(other, theirs, 2)
    assert everything(optimizer) == everything(other)


def test_groups_have_step_sizes_of_their_own(name):
    options = follows_lr(name)
    params = make_params([(4, 6), (4, 6)], seed=1)
    params[1].data.copy_(params[0])
    optimizer = hf_optim.create(name, [{"params": [params[0]], "lr": 0.0}, {"params": [params[1]]}], lr=0.5, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.5
    start = params[0].detach().clone()
    for p in params:
        p.grad = seeded_grad(p, 1)
    optimizer.step(loss=loss_of(optimizer))
    assert torch.equal(params[0], start) and not torch.equal(params[1], start)


def test_a_decay_set_in_the_group_counts_like_one_given_at_construction(name):
    a, b = make_params(TWO), make_params(TWO)
    options = {"decay": "decoupled"} if hf_optim.info(name).preset.get("decay") == "cpr" else {}
    optimizer = hf_optim.create(name, a, weight_decay=0.25, **options)
    other, plain = hf_optim.create(name, b, **options), make_params(TWO)
    other.param_groups[0]["weight_decay"] = 0.25
    advance(optimizer, a, 3)
    advance(other, b, 3)
    advance(hf_optim.create(name, plain, **options), plain, 3)
    assert same(a, b) and not same(a, plain)


def test_an_option_changed_in_the_group_acts_at_the_next_step(name):
    optimizer, params = build(name, **moments(name))
    advance(optimizer, params, 2)
    before = twin(optimizer, params)
    optimizer.param_groups[0]["centralize"] = True
    after = twin(optimizer, params)  # a fresh optimizer knows no other value
    for o, own in ((optimizer, params), before, after):
        advance(o, own, 2, first=3)
    assert everything(optimizer) == everything(after[0]) and not same(params, before[1])


@pytest.mark.parametrize("key, value", [("lr", math.nan), ("weight_decay", math.inf), ("precision", "exact")])
def test_a_bad_value_in_the_group_is_refused_before_anything_changes(name, key, value):
    optimizer, params = build(name)
    advance(optimizer, params, 2)
    before = everything(optimizer)
    good, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
    with pytest.raises(ValueError, match=f"`{key}` must be"):
        advance(optimizer, params, 1, first=3)
    optimizer.param_groups[0][key] = good
    assert everything(optimizer) == before


@pytest.mark.parametrize("backend", ["loop", "fused"])
@pytest.mark.parametrize("which", ["adamw", "adafactor_corrected", "smmf"])
def test_a_weight_cut_in_place_is_refused(which, backend):
    optimizer, (p,) = build(which, [(8, 64)], backend=backend)
    advance(optimizer, [p], 2)
    p.data = p.data[:5]  # rows of a vocabulary, say: its storage is the same
    before = frozen(p)
    with pytest.raises(ValueError, match="no state fits"):
        advance(optimizer, [p], 1, first=3)
    assert frozen(p) == before


@pytest.mark.parametrize("backend", ["loop", "fused"])
def test_gradients_may_change_their_dtype(backend):
    optimizer, (p,) = build("adamw", [(8, 64)], BF16, backend=backend)
    reference, (q,) = build("adamw", [(8, 64)], BF16, backend="loop")
    for dtype in (BF16, BF16, torch.float32, BF16):
        g = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
        for x, step in ((p, optimizer.step), (q, reference.step)):
            x.grad = None
            x.grad_dtype = dtype
            x.grad = g.to(dtype)
            step()
    assert torch.allclose(p, q, atol=1e-2) and torch.allclose(optimizer.state[p]["v"], reference.state[q]["v"])


@pytest.mark.parametrize("backend", ["loop", "fused"])
@pytest.mark.parametrize("which", ["adamw", "adafactor_corrected", "muon"])
def test_state_may_get_new_data(which, backend):
    (one, params), (two, theirs) = (build(which, [(64, 64), (64,)], backend=backend) for _ in range(2))
    for optimizer, own in ((one, params), (two, theirs)):
        advance(optimizer, own, 2)
    for state in one.state.values():
        for x in state.values():
            if isinstance(x, torch.Tensor):
                x.data = x.data.clone()
    for optimizer, own in ((one, params), (two, theirs)):
        advance(optimizer, own, 2, first=3)
    assert everything(one) == everything(two)


@pytest.mark.parametrize("backend", ["loop", "fused"])
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("which", ["adamw", "adafactor_corrected", "muon"])
def test_what_is_moved_away_leaves_memory_at_once(which, release, backend):
    optimizer, params = build(which, [(64, 64), (8, 64), (64,)], backend=backend)
    handle = optimizer.release_gradients() if release else None

    def step():
        sum(p.square().sum() for p in params).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state():
        return [(s, k, x) for s in optimizer.state.values() for k, x in s.items() if isinstance(x, torch.Tensor)]

    step()
    step()
    versions = [p._version for p in params]
    held = [StorageWeakRef(x.untyped_storage()) for x in [*(x for _, _, x in state()), *params]]
    for s, key, x in state():
        s[key] = x.clone()
    for p in params:
        p.data = p.data.clone()
    del s, x, p
    assert all(storage.expired() for storage in held)
    assert [p._version for p in params] == versions
    expected, theirs = build(which, [(64, 64), (8, 64), (64,)], backend=backend)
    expected.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, theirs):
        q.data = p.data.clone()
    step()
    sum(q.square().sum() for q in theirs).backward()
    if handle:
        expected.param_groups[0]["gradient_release"] = False
    expected.step()
    assert frozen(params) == frozen(theirs)


def test_an_option_that_needs_state_cannot_join_later():
    optimizer, params = build("sm3")
    advance(optimizer, params, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="no state fits: an option, shape or dtype changed; make it anew"):
        advance(optimizer, params, 1, first=3)


def test_a_learning_rate_that_is_a_tensor_in_the_group_counts_as_its_value(name):
    optimizer, params, other, theirs = pair(name, TWO, lr=0.5, **follows_lr(name))
    for o, lr in ((optimizer, torch.tensor(0.25)), (other, 0.25)):
        o.param_groups[0] |= {"initial_lr": 0.5, "lr": lr}
    for t, lr in ((1, 0.25), (2, 0.125)):
        optimizer.param_groups[0]["lr"].fill_(lr)
        other.param_groups[0]["lr"] = lr
        advance(optimizer, params, 1, first=t)
        advance(other, theirs, 1, first=t)
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in zip(params, theirs))
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_learning_rate_of_two_elements_is_refused(name):
    with pytest.raises(ValueError, match="`lr` must be"):
        hf_optim.create(name, make_params(TWO), lr=torch.tensor([0.1, 0.2]))


def test_a_scheduler_has_nothing_to_warn_of(name):
    optimizer, params = build(name, TWO)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in (1, 2, 3):
            advance(optimizer, params, 1, first=t)
            schedule.step()


# ---- gradients -----------------------------------------------------------------------------------------------------


def test_gradients_that_are_views_of_one_buffer_are_as_good_as_their_own(name):
    # DDP's gradient_as_bucket_view: offsets into a flat buffer
    optimizer, params, other, theirs = pair(name, **flags_on(name))
    for t in (1, 2, 3):
        grads = fill_grads(params, seed=t)
        bucket = torch.cat([torch.zeros(1), *(g.flatten() for g in grads)])
        offset = 1
        for q in theirs:
            q.grad = bucket[offset : offset + q.numel()].view(q.shape)
            offset += q.numel()
        optimizer.step(loss=loss_of(optimizer, t))
        other.step(loss=loss_of(other, t))
    assert everything(optimizer) == everything(other)


def test_a_gradient_expanded_from_one_number_is_read_right(name):
    optimizer, params, other, theirs = pair(name, TWO, **flags_on(name))
    for t in (1, 2, 3):
        for p, q in zip(params, theirs):
            p.grad, q.grad = torch.full_like(p, 0.5 * t), torch.tensor(0.5 * t).expand(q.shape)
        optimizer.step(loss=loss_of(optimizer, t))
        other.step(loss=loss_of(other, t))
    for p, q in zip(params, theirs):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


def test_a_gradient_with_a_graph_leaves_no_graph_behind(name):
    # backward(create_graph=True)
    optimizer, params, other, theirs = pair(name, TWO)
    for t in (1, 2):
        fill_grads(theirs, seed=t)
        for p, q in zip(params, theirs):
            p.grad = q.grad * torch.ones((), requires_grad=True)
        optimizer.step(loss=loss_of(optimizer, t))
        other.step(loss=loss_of(other, t))
    assert all(p.is_leaf and p.requires_grad and p.grad.requires_grad for p in params)
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert not any(v.requires_grad for v in state) and everything(optimizer) == everything(other)


def test_a_gradient_wider_than_its_weight_is_not_rounded(name):
    (narrow,), (plain,) = make_params([(4, 6)], BF16), make_params([(4, 6)], BF16)
    wide = torch.nn.Parameter(narrow.detach().float())
    optimizers = [hf_optim.create(name, [p], **moments(name)) for p in (narrow, wide, plain)]
    g = seeded_grad(wide, 1)
    narrow.grad_dtype = torch.float32
    narrow.grad, wide.grad, plain.grad = g, g.clone(), g.to(BF16)
    for o in optimizers:
        o.step(loss=loss_of(o))
    states = [[v for k, v in o.state[p].items()] for o, p in zip(optimizers, (narrow, wide, plain))]
    assert frozen(states[0]) == frozen(states[1]) != frozen(states[2])
    assert same([narrow], [wide.to(BF16)])


def test_no_gradient_is_kept_alive(name):
    optimizer, params = build(name, TWO, **rich(name))
    for t in (1, 2):
        watched = [weakref.ref(g) for g in fill_grads(params, seed=t)]
        places = {g().untyped_storage().data_ptr() for g in watched}
        optimizer.step(loss=loss_of(optimizer, t))
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        assert not places & {v.untyped_storage().data_ptr() for v in state}
        optimizer.zero_grad()
        assert not any(g() is not None for g in watched)


def test_a_gradient_on_another_device_is_refused_before_the_step(name):
    optimizer, params = build(name, TWO)
    advance(optimizer, params, 1)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="device"):
        params[0].grad = torch.zeros(4, 6, device="meta")
    assert everything(optimizer) == before
    advance(optimizer, params, 1, first=2)


def test_nan_in_one_tensor_stays_there_and_is_seen(name):
    optimizer, params, other, theirs = pair(name, TWO)
    fill_grads(params, seed=1), fill_grads(theirs, seed=1)
    params[0].grad[0, 0] = float("nan")
    optimizer.step(loss=loss_of(optimizer))
    other.step(loss=loss_of(other))
    assert params[0].isnan().any()  # it is not hidden
    if not any(optimizer.all_sums(group) for group in optimizer.param_groups):
        assert same(params[1:], theirs[1:])


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e-10, 1e6, 1e17, 1e25, 1e37])
def test_gradients_of_any_size_leave_finite_weights(name, size):
    optimizer, params = build(name, lr=0.01)
    for t in range(1, 5):
        advance(optimizer, params, 1, first=t, scale=size)
    assert all(p.isfinite().all() for p in params)


def test_after_one_huge_gradient_the_run_goes_on(name):
    optimizer, params = build(name, lr=0.01)
    advance(optimizer, params, 2)
    advance(optimizer, params, 1, first=3, scale=1e25)
    before = [p.detach().clone() for p in params]
    advance(optimizer, params, 10, first=4)
    assert all(p.isfinite().all() for p in params)
    assert all(not torch.equal(p, q) for p, q in zip(params, before) if p.numel() > 1)  # a scalar may come back


# ---- surroundings --------------------------------------------------------------------------------------------------

CONTEXTS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": lambda: deterministic(),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "saved_tensors": lambda: torch.autograd.graph.save_on_cpu(),
}


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_step_does_not_see_its_surroundings(name, context):
    optimizer, params, other, theirs = pair(name, **flags_on(name))
    advance(optimizer, params, 4)
    advance(other, theirs, 1)
    for t in (2, 3):
        fill_grads(theirs, seed=t)
        with CONTEXTS[context]():
            other.step(loss=loss_of(other, t))
    advance(other, theirs, 1, first=4)
    assert everything(optimizer) == everything(other)


def test_a_step_under_autocast_is_the_same_step(name):
    optimizer, params, other, theirs = pair(name, TWO)
    for t in (1, 2):
        fill_grads(params, seed=t), fill_grads(theirs, seed=t)
        optimizer.step(loss=loss_of(optimizer, t))
        with torch.autocast("cpu", BF16):
            other.step(loss=loss_of(other, t))
    assert everything(optimizer) == everything(other)


def test_meta_parameters_can_be_stepped(name):
    # how frameworks plan memory: shapes and dtypes without storage
    real, params = build(name, **rich(name))
    advance(real, params, 1)
    shadows = [torch.nn.Parameter(p.detach().to("meta")) for p in params]
    optimizer = hf_optim.create(name, shadows, **rich(name))
    for p in shadows:
        p.grad = torch.empty_like(p)
    optimizer.step(loss=loss_of(optimizer))
    for p, q in zip(params, shadows):
        kinds = [
            {k: (v.shape, v.dtype) for k, v in o.state[x].items() if isinstance(v, torch.Tensor)}
            for o, x in ((real, p), (optimizer, q))
        ]
        assert kinds[0] == kinds[1]
        assert all(v.is_meta for v in optimizer.state[q].values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("order", [("cpu", "meta"), ("meta", "cpu")], ids="-".join)
def test_parameters_on_two_devices_are_stepped_each_on_its_own(name, order):
    # as a model spread over several GPUs; the values on the second device are not looked at
    if hf_optim.info(name).needs_loss:  # meta tensors hold no step size that the other device could get
        order = ("cpu", "meta")
    params = [torch.nn.Parameter(p.detach().to(device)) for p, device in zip(make_params(TWO), order)]
    optimizer, alone = hf_optim.create(name, params, **apart(name)), make_params(TWO)
    for t in (1, 2):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step(loss=loss_of(optimizer, t))
    here = order.index("cpu")
    other = hf_optim.create(name, alone[here : here + 1], **apart(name))
    for t in (1, 2):
        alone[here].grad = torch.full_like(alone[here], 0.5)
        other.step(loss=loss_of(other, t))
    assert same([params[here]], [alone[here]])
    state = [v for v in optimizer.state[params[1 - here]].values() if isinstance(v, torch.Tensor)]
    assert all(v.is_meta for v in state)


def test_the_default_device_of_torch_does_not_matter(name):
    fractional_adamw.exponentials.cache_clear()
    optimizer, params, other, theirs = pair(name, TWO)
    advance(optimizer, params, 2)
    fractional_adamw.exponentials.cache_clear()
    for t in (1, 2):
        fill_grads(theirs, seed=t)
        with torch.device("meta"):
            other.step(loss=loss_of(other, t))
    assert everything(optimizer) == everything(other)


def test_two_threads_with_an_optimizer_each_do_not_disturb_one_another(name):
    runs = [build(name, TWO, seed=seed, **rich(name)) for seed in (0, 1, 0, 1)]
    for optimizer, params in runs[:2]:
        advance(optimizer, params, 8)
    threads = [threading.Thread(target=advance, args=(*run, 8)) for run in runs[2:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [everything(run[0]) for run in runs[:2]] == [everything(run[0]) for run in runs[2:]]


def test_two_equal_runs_are_equal_to_the_bit(name):
    layout = {"dtype": BF16, "precision": "stochastic", "state_dtype": "bfloat16"}
    optimizer, params, other, theirs = pair(name, **layout, **flags_on(name))
    advance(optimizer, params, 4)
    torch.manual_seed(7)
    advance(other, theirs, 4)
    assert everything(optimizer) == everything(other)


def test_nothing_is_warned_of_in_an_ordinary_run(name, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, params = build(name)
        advance(optimizer, params, 2)
        optimizer.load_state_dict(reloaded(optimizer.state_dict()))
        advance(optimizer, params, 1, first=3)
    hints = [r.getMessage() for r in caplog.records]
    assert len(hints) == len(set(hints)) <= 1, hints  # what a rule or a preset needs is said once


def test_an_optimizer_that_is_dropped_is_gone(name):
    optimizer, params = build(name, TWO, **rich(name))
    advance(optimizer, params, 2)
    watched = weakref.ref(next(v for v in optimizer.state[params[0]].values() if isinstance(v, torch.Tensor)))
    del optimizer
    assert watched() is None  # memory of the state is free at once, not when the collector runs


# ---- hooks ---------------------------------------------------------------------------------------------------------


def test_global_step_hooks_run_outside_those_of_the_optimizer(name):
    optimizer, params = build(name, TWO)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("own pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("own post"))
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append("pre") if o is optimizer else None),
        register_optimizer_step_post_hook(lambda o, *_: seen.append("post") if o is optimizer else None),
    ]
    try:
        advance(optimizer, params, 1)
    finally:
        for handle in handles:
            handle.remove()
    advance(optimizer, params, 1, first=2)
    assert seen == ["pre", "own pre", "own post", "post", "own pre", "own post"]


def test_a_step_hook_may_replace_the_arguments(name):
    optimizer, params, other, theirs = pair(name, TWO)
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "loss": 0.5}))
    fill_grads(params, seed=1), fill_grads(theirs, seed=1)
    optimizer.step(loss=3.0)
    handle.remove()
    other.step(loss=0.5)
    assert everything(optimizer) == everything(other)


def test_hooks_around_the_state_dict_run_in_order_and_can_be_removed(name):
    optimizer, params = build(name, TWO)
    advance(optimizer, params, 1)
    seen = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre 1")),
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre 0"), prepend=True),
        optimizer.register_state_dict_post_hook(lambda o, d: seen.append("post 1")),
        optimizer.register_state_dict_post_hook(lambda o, d: seen.append("post 0"), prepend=True),
        optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("load pre 1")),
        optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("load pre 0"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post 1")),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post 0"), prepend=True),
    ]
    optimizer.load_state_dict(optimizer.state_dict())
    around = ["pre 0", "pre 1", "post 0", "post 1"]
    assert seen == [*around, "load pre 0", "load pre 1", "load post 0", "load post 1"]
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 8


def test_a_load_hook_may_change_the_dict_in_place(name):
    optimizer, params = build(name, TWO)
    advance(optimizer, params, 1)

    def slower(_, given):
        for group in given["param_groups"]:
            group["lr"] = 0.03125

    optimizer.register_load_state_dict_pre_hook(slower)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.03125


# ---- closures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "tensor", "one element"])
def test_what_a_closure_returns_is_returned_as_it_is(name, kind):
    optimizer, params = build(name, TWO)
    fill_grads(params, seed=1)
    value = {"float": 1.5, "tensor": torch.tensor(1.5), "one element": torch.tensor([1.5])}[kind]
    assert optimizer.step(lambda: value) is value
    assert optimizer.step(closure=lambda: value) is value


def test_without_a_closure_nothing_is_returned(name):
    optimizer, params = build(name, TWO)
    assert optimizer.step() is None
    fill_grads(params, seed=1)
    assert optimizer.step(loss=loss_of(optimizer)) is None


def test_a_closure_that_fails_changes_nothing(name):
    optimizer, params, other, theirs = pair(name, TWO)
    advance(optimizer, params, 1)
    advance(other, theirs, 1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert everything(optimizer) == everything(other) and torch.is_grad_enabled()
    advance(optimizer, params, 1, first=2)
    advance(other, theirs, 1, first=2)
    assert everything(optimizer) == everything(other)


def test_a_closure_that_leaves_no_gradient_moves_nothing(name):
    optimizer, params = build(name, TWO, weight_decay=0.5)
    before = frozen(params)

    def closure():
        optimizer.zero_grad()
        return 1.0

    assert optimizer.step(closure) == 1.0 and frozen(params) == before


# ---- checkpoints and copies ----------------------------------------------------------------------------------------


def test_a_checkpoint_from_before_a_parameter_had_a_gradient_goes_on(name):
    optimizer, params = build(name, TWO, **rich(name))
    fill_grads(params[:1], seed=1)
    optimizer.step(loss=loss_of(optimizer, 1))
    new, theirs = twin(optimizer, params)
    assert everything(new) == everything(optimizer)
    optimizer.zero_grad()
    advance(optimizer, params, 3, first=2)
    advance(new, theirs, 3, first=2)
    assert everything(new) == everything(optimizer)


def test_the_state_of_fp32_weights_loads_beside_bf16_weights_as_it_was(name):
    optimizer, params = build(name, TWO, **rich(name))
    advance(optimizer, params, 2)
    narrow = [torch.nn.Parameter(p.detach().to(BF16)) for p in params]
    new = type(optimizer)(narrow)
    new.load_state_dict(reloaded(optimizer.state_dict()))
    assert frozen(new.state_dict()["state"]) == frozen(optimizer.state_dict()["state"])
    advance(new, narrow, 2, first=3)
    assert all(p.isfinite().all() and p.dtype == BF16 for p in narrow)


def test_a_copy_keeps_groups_of_their_own(name):
    a, b = make_params(TWO)
    optimizer = hf_optim.create(name, [{"params": [a], "lr": 0.25}, {"params": [b], "seed": 5}])
    advance(optimizer, [a, b], 1)
    for new in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert everything(new) == everything(optimizer) and new.defaults == optimizer.defaults
        new.param_groups[0]["lr"] = 9.0
        assert optimizer.param_groups[0]["lr"] == 0.25
        new.add_param_group({"params": make_params([(3,)])})
        assert len(optimizer.param_groups) == 2


def test_state_and_weights_share_no_storage(name):
    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 2)
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    places = [x.untyped_storage().data_ptr() for x in [*params, *tensors] if x.numel()]
    assert len(places) == len(set(places))


def test_a_step_far_into_a_run_is_finite(name):
    optimizer, params = build(name, **rich(name))
    advance(optimizer, params, 1)
    for late in (10**5, 10**7, 2**31):
        for p in params:
            optimizer.state[p]["step"] = late
        optimizer.param_groups[0]["step"] = late
        before = [p.detach().clone() for p in params]
        advance(optimizer, params, 2, first=2)
        assert all(p.isfinite().all() for p in params)
        assert any(not torch.equal(p, q) for p, q in zip(params, before))


# ---- subclasses ----------------------------------------------------------------------------------------------------


def test_a_subclass_may_add_an_option_and_override_the_rule(name):
    base = hf_optim.info(name).cls

    class Mine(base):
        """A rule that multiplies the gradient."""

        factor: float = hf_optim.core.hp(1.0, "multiplies the gradient", gt=0)

        @staticmethod
        def update(g, p, s, h):
            return base.update(h.factor * g, p, s, h)

    preset, params = hf_optim.info(name).preset, make_params(TWO)
    optimizer = hf_optim.create(name, params, **moments(name))
    plain, twice, options = make_params(TWO), make_params(TWO), {**preset, **moments(name)}
    one, two = Mine(plain, **options), Mine(twice, factor=2.0, **options)
    for o, own in ((optimizer, params), (one, plain), (two, twice)):
        advance(o, own, 2)
    state = [[list(o.state[p].values()) for p in own] for o, own in ((one, plain), (two, twice))]
    assert same(params, plain) and frozen(state[0]) != frozen(state[1])
    with pytest.raises(ValueError, match="Mine: `factor` must be a float in"):
        Mine(make_params(TWO), factor=0.0)
    with pytest.raises(ValueError, match="Mine cannot load this checkpoint"):
        one.load_state_dict(optimizer.state_dict())
    assert "factor" not in base.options()


# ---- symmetries and direction --------------------------------------------------------------------------------------


def test_turning_every_sign_turns_the_run_around(name):
    optimizer, params, other, theirs = pair(name, TWO)
    with torch.no_grad():
        for q in theirs:
            q.neg_()
    for t in range(1, 6):
        for q, g in zip(theirs, fill_grads(params, seed=t)):
            q.grad = -g
        optimizer.step(loss=loss_of(optimizer, t))
        other.step(loss=loss_of(other, t))
    for p, q in zip(params, theirs):
        assert torch.allclose(p, -q, rtol=0, atol=1e-6)


def test_the_order_of_rows_does_not_matter(name):
    order = torch.tensor([3, 0, 2, 1])
    (p,), (q,) = make_params([(4, 6)], torch.float64), make_params([(4, 6)], torch.float64)
    q.data.copy_(p.detach()[order])
    optimizer, other = hf_optim.create(name, [p]), hf_optim.create(name, [q])
    for t in range(1, 6):
        (g,) = fill_grads([p], seed=t)
        q.grad = g[order]
        optimizer.step(loss=loss_of(optimizer, t))
        other.step(loss=loss_of(other, t))
    assert torch.allclose(p.detach()[order], q, rtol=0, atol=1e-9)


def test_it_goes_down_a_bowl(name):
    p = torch.nn.Parameter(make_params([(6, 4)])[0].detach())
    options = {"adalo": {"kappa": 0.5, "beta2": 0.5}, "sm3": {"lr": 1.0}, "spectral_adamw": {"lr": 0.1, "tau": 0.1}}
    optimizer = hf_optim.create(name, [p], **options.get(name, {"lr": 0.1}), **follows_lr(name))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 100)
    first = None
    for _ in range(100):
        optimizer.zero_grad()
        loss = p.square().sum() / 2
        loss.backward()
        first = first or float(loss.detach())
        optimizer.step(loss=loss if optimizer.needs_loss else None)
        schedule.step()
    assert p.detach().square().sum() / 2 < 0.1 * first


@pytest.mark.parametrize("saved, now", [(BF16, torch.float32), (torch.float32, BF16)])
def test_kahan_state_follows_the_dtype_of_the_weights(saved, now):
    """PEFT loads bf16 adapters in fp32: their checkpoint has a residual too many."""
    one, params = build("adamw", dtype=saved, precision="kahan")
    advance(one, params, 2)
    two, theirs = build("adamw", dtype=now, precision="kahan")
    two.load_state_dict(reloaded(one.state_dict()))
    for p, q in zip(params, theirs):
        q.data.copy_(p)
        assert frozen(two.state[q]["m"]) == frozen(one.state[p]["m"])
        assert ("residual" in two.state[q]) == (now == BF16)
    advance(two, theirs, 1, first=3)
    assert {two.state[q]["step"] for q in theirs if q.numel()} == {3} and all(q.isfinite().all() for q in theirs)
