# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in the rules of Adam's family and in Muon: one named test for each way to fail."""

import copy
import logging
import math

import pytest
import torch
from conftest import advance, fill_grads, make_params
from test_hazards import close, one_step, zeros

import hf_optim
from hf_optim.core import rms
from hf_optim.core.pipeline import View
from hf_optim.optim.fractional_adamw import weights
from hf_optim.optim.muon import Muon, orthogonalize
from hf_optim.optim.nadamw import NAdamW, schedule
from hf_optim.optim.sgd import SGD
from hf_optim.optim.spectral_adamw import SpectralAdamW, spectral_norm
from hf_optim.registry import param_groups


def zeros64(*shape):
    return zeros(*shape, dtype=torch.float64)


def updates(optimizer, gradients):
    """The updates (the lr is 1) for these gradients, from weights at 0 before every step."""
    (p,) = optimizer.parameters()
    found = []
    for g in gradients:
        p.data.zero_()
        found.append(-one_step(optimizer, torch.as_tensor(g, dtype=p.dtype).expand_as(p).clone()))
    return found


def constant(optimizer, g, steps):
    """The updates of the first weight for a constant gradient."""
    return [u.flatten()[0].item() for u in updates(optimizer, [g] * steps)]


def draws(shape, steps, scale=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


# ---- AdamW with amsgrad --------------------------------------------------------------------------------------------
def test_amsgrad_denominator_never_falls():
    p = zeros64(1)
    optimizer = hf_optim.AdamW([p], lr=1.0, amsgrad=True, beta2=0.5, eps=0.0)
    m, v, largest = 0.0, 0.0, 0.0
    for t, (g, u) in enumerate(zip([8.0] + [0.5] * 9, updates(optimizer, [8.0] + [0.5] * 9)), 1):
        m, v = 0.9 * m + 0.1 * g, 0.5 * v + 0.5 * g * g
        largest = max(largest, v)
        assert u.item() == pytest.approx(m / (1 - 0.9**t) / math.sqrt(largest / (1 - 0.5**t)), rel=1e-12)
    assert largest == 32 and v < 0.4  # the spike is remembered, the average has forgotten it


def test_amsgrad_maximum_of_bf16_state_stays_fp32():
    # a maximum never forgets an upward rounding
    (p,) = make_params([(6, 4)])
    optimizer = hf_optim.AdamW([p], amsgrad=True, state_dtype="bfloat16")
    advance(optimizer, [p], 3)
    assert optimizer.state[p]["v_max"].dtype == torch.float32 and optimizer.state[p]["v"].dtype == torch.bfloat16


def test_amsgrad_acts_or_is_refused(name):
    # inherited by rules that overwrite what it belongs to
    if "amsgrad" not in hf_optim.info(name).options:
        pytest.skip("no such option")
    found = []
    for amsgrad in (False, True):
        p = zeros64(6)  # a vector: Muon's AdamW
        try:
            optimizer = hf_optim.create(name, [p], beta2=0.5, amsgrad=amsgrad)
        except (ValueError, TypeError) as error:
            assert "amsgrad" in str(error)
            return
        for g in (4.0, 0.1, -0.2, 0.1):
            one_step(optimizer, g)
        found.append(p.detach())
    assert not torch.equal(*found), "amsgrad had no effect"


# ---- NAdamW --------------------------------------------------------------------------------------------------------
def test_nadamw_first_step():
    p = zeros64(2)
    moved = one_step(hf_optim.create("nadamw", [p]), torch.tensor([3.0, -0.5], dtype=torch.float64))
    close(moved, torch.tensor([-2.1129036e-3, 2.1129036e-3]), rtol=1e-7)


def test_nadamw_schedule_takes_thousands_of_steps():
    wanted = {1: 0.450, 100: 0.457, 1000: 0.518, 4246: 0.675, 10_000: 0.812}
    for t, mu in wanted.items():
        assert schedule(t, 0.9, 4e-3) == pytest.approx(mu, abs=1e-3)
    assert schedule(10**6, 0.9, 4e-3) == pytest.approx(0.9, rel=1e-9)


def test_nadamw_product_that_underflows_is_harmless():
    h = View({"beta1": 0.9, "beta2": 0.999, "momentum_decay": 4e-3})
    exact = 1.0
    for t in range(1, 3000):
        exact *= schedule(t, 0.9, 4e-3)
        after = schedule(t + 1, 0.9, 4e-3)
        found = NAdamW.scalars(t, h)
        assert found["fresh"] == pytest.approx((1 - schedule(t, 0.9, 4e-3)) / (1 - exact), rel=1e-14)
        assert found["ahead"] == pytest.approx(after / (1 - exact * after), rel=1e-14)
    assert exact < 1e-300 or exact == 0


def test_nadamw_jumped_into_a_late_step_has_the_right_product():
    # a resumed run asks for step 5000 first; losing the count would halve the momentum
    ask = View({"beta1": 0.93, "beta2": 0.999, "momentum_decay": 1e-3})
    late = NAdamW.scalars(50, ask)
    exact = math.prod(schedule(t, 0.93, 1e-3) for t in range(1, 51))
    assert late["fresh"] == pytest.approx((1 - schedule(50, 0.93, 1e-3)) / (1 - exact), rel=1e-14)


def test_nadamw_decay_is_decoupled():
    p = torch.nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))
    one_step(hf_optim.create("nadamw", [p], lr=0.1, weight_decay=0.5), 0.0)
    close(p, 1.9, rtol=1e-15)


# ---- adam_atan2 ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("b, a", [(1.0, 4 / math.pi), (2.0, 2.157), (4.0, 4.082), (8.0, 8.041)])
def test_atan2_table_of_a_and_b_makes_the_first_step_lr(b, a):
    moved = one_step(hf_optim.create("adam_atan2", [zeros64(3)], lr=1.0, atan2_a=a, atan2_b=b), 0.7)
    close(moved, -1.0, rtol=3e-4)
    close(moved, -a * math.atan(1 / b), rtol=1e-14)


def test_atan2_gain_falls_with_the_ratio():
    # with the default a and b a small ratio steps 1.27 times as far as Adam, a ratio of 2 only 0.70 times
    h = View({"atan2_a": 1.27, "atan2_b": 1.0})
    for ratio, gain in {0.05: 1.269, 0.5: 1.178, 1.0: 0.997, 2.0: 0.703}.items():
        u = hf_optim.transforms.Atan2.apply(torch.tensor(ratio), torch.tensor(1.0), h)
        assert u.item() / ratio == pytest.approx(gain, abs=6e-4)


def test_atan2_is_odd():
    (p,), (q,) = make_params([(6, 9)]), make_params([(6, 9)])
    q.data.neg_()
    a, b = hf_optim.create("adam_atan2", [p]), hf_optim.create("adam_atan2", [q])
    for t in range(20):
        (g,) = fill_grads([p], seed=t)
        q.grad = -g
        a.step(), b.step()
    assert torch.equal(p, -q)


def test_atan2_signed_zeros_do_not_turn_around():
    # atan2(0, -0) is pi
    p = zeros(4)
    optimizer = hf_optim.create("adam_atan2", [p], lr=1.0)
    for g in ([0.0, -0.0, 0.0, -0.0], [-0.0, -0.0, 0.0, 0.0], [0.0] * 4):
        assert not one_step(optimizer, torch.tensor(g)).any()


def test_atan2_of_gradients_whose_square_underflows_stays_bounded():
    p = zeros(2)
    moved = one_step(hf_optim.create("adam_atan2", [p], lr=1.0), torch.tensor([1e-25, -1e-25]))
    close(moved, 1.27 * math.pi / 2 * torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=1e-6)


def test_atan2_counts_an_entry_whose_square_overflows_as_zero():
    p = zeros(3)
    optimizer = hf_optim.create("adam_atan2", [p], lr=1.0)
    one_step(optimizer, torch.tensor([1e20, 1.0, 1.0]))
    assert p[0] == 0 and p[1] != 0  # g^2 = inf would give u = 0, too, and then freeze the weight for ever
    one_step(optimizer, torch.ones(3))
    assert p[0] != 0 and p.isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_atan2_shows_an_overflow_at_the_next_step(bad):
    # atan2(inf, inf) = pi / 4 hides it once; moments that stay inf would freeze the weight for ever without a sign
    p = zeros(3)
    optimizer = hf_optim.create("adam_atan2", [p], lr=1.0)
    one_step(optimizer, torch.tensor([bad, 1.0, 1.0]))
    one_step(optimizer, torch.ones(3))
    assert p[0].isnan() and p[1:].isfinite().all()


def test_atan2_gradient_that_stops_lets_the_weight_stop():
    p = zeros(3)
    found = updates(hf_optim.create("adam_atan2", [p], lr=1.0), [1.0] * 5 + [0.0] * 200)
    sizes = [u.abs().max().item() for u in found]
    assert all(b < a for a, b in zip(sizes[5:], sizes[6:])) and sizes[-1] < 1e-6


def test_atan2_refuses_an_eps():
    with pytest.raises(ValueError, match="`eps` has no effect with `denominator=atan2`"):
        hf_optim.create("adam_atan2", [zeros(3)], eps=1e-6)


# ---- softplus_adamw ------------------------------------------------------------------------------------------------
STEPS = {"inside": (1.000, 0.9987, 0.5133, 0.0696), "outside": (0.894, 0.204, 0.0226, 0.00228)}


def softplus(z, beta=50.0):
    return math.log1p(math.exp(beta * z)) / beta


@pytest.mark.parametrize("form", STEPS)
def test_softplus_first_step(form):
    gradients = (1.0, 0.1, 1e-2, 1e-3)
    optimizer = hf_optim.create("softplus_adamw", [zeros64(4)], lr=1.0, softplus_bias=form)
    moved = one_step(optimizer, torch.tensor(gradients, dtype=torch.float64))
    part = {"inside": 1.0, "outside": math.sqrt(1e-3)}[form]
    close(moved, torch.tensor([-part * g / softplus(part * g) for g in gradients], dtype=torch.float64), rtol=1e-8)
    close(moved, -torch.tensor(STEPS[form]), rtol=5e-3)


def test_softplus_of_small_gradients_is_momentum_with_a_larger_lr():
    shrink = {1e-4: 139, 1e-3: 14.4, 1e-2: 1.95, 0.05: 1.03}
    for g, times in shrink.items():
        moved = one_step(hf_optim.create("softplus_adamw", [zeros64(1)], lr=1.0), g)
        assert -1 / moved.item() == pytest.approx(times, rel=6e-3)
    moved = one_step(hf_optim.create("softplus_adamw", [zeros64(1)], lr=1.0), 1e-9)
    assert moved.item() == pytest.approx(-50 * 1e-9 / math.log(2), rel=1e-6)


def test_softplus_of_large_beta_is_adam():
    ours, adam = zeros64(6, 9), zeros64(6, 9)
    sharp = updates(hf_optim.create("softplus_adamw", [ours], lr=1.0, softplus_beta=1e9), draws((6, 9), 10))
    plain = updates(hf_optim.AdamW([adam], lr=1.0, eps=0.0), draws((6, 9), 10))
    for a, b in zip(sharp, plain):
        close(a, b, rtol=1e-9)


@pytest.mark.parametrize("form", STEPS)
def test_softplus_steps_are_shorter_than_adams(form):
    gradients = draws((40, 9), 20, scale=0.02)
    soft = updates(hf_optim.create("softplus_adamw", [zeros64(40, 9)], lr=1.0, softplus_bias=form), gradients)
    for a, b in zip(soft, updates(hf_optim.AdamW([zeros64(40, 9)], lr=1.0, eps=0.0), gradients)):
        assert (a.abs() < b.abs()).all()


def test_softplus_zero_gradient_does_not_move():
    for form in STEPS:
        p = zeros(3)
        assert not one_step(hf_optim.create("softplus_adamw", [p], lr=1.0, softplus_bias=form), 0.0).any()


def test_softplus_with_amsgrad_is_samsgrad():
    p = zeros64(1)
    optimizer = hf_optim.create("softplus_adamw", [p], lr=1.0, amsgrad=True, softplus_bias="outside")
    m = v = largest = 0.0
    gradients = [0.3] + [0.01] * 8
    for t, (g, u) in enumerate(zip(gradients, updates(optimizer, gradients)), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        largest = max(largest, v)
        wanted = math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / softplus(math.sqrt(largest))
        assert u.item() == pytest.approx(wanted, rel=1e-12)


def test_softplus_works_on_every_rule_with_a_ratio(name):
    info = hf_optim.info(name)
    if not info.cls.uses_ratio:
        with pytest.raises(ValueError, match="`denominator=softplus` cannot act on .*: it has no ratio"):
            hf_optim.create(name, [zeros(3)], denominator="softplus")
        return
    for form in STEPS:
        p = zeros(6, 4)
        try:
            optimizer = hf_optim.create(name, [p], denominator="softplus", softplus_bias=form)
        except ValueError as error:  # a rule whose bias is not corrected outside may refuse, by name
            assert form in str(error)
            continue
        moved = one_step(optimizer, torch.randn(6, 4), **({"loss": 1.0} if info.needs_loss else {}))
        assert moved.isfinite().all() and moved.any()


# ---- AM-SGD --------------------------------------------------------------------------------------------------------
def assert_lowest(f, at):
    """`at` minimises a strictly convex function of the plane: a lower point would show in every neighbourhood."""
    turn = torch.arange(360, dtype=torch.float64) * math.pi / 180
    circle = torch.stack([turn.cos(), turn.sin()], 1) * at.abs().max()
    around = torch.cat([at + circle * 10.0**-k for k in range(6)])
    least = f(at.unsqueeze(0))
    assert (f(around) > least).all()


def test_am_sgd_minimises_the_larger_of_two_planes():
    inside = 0
    for seed in range(12):
        first, g = draws((2,), 2, seed=seed)
        p, lr, pull = zeros64(2), 0.3, 0.1 + 0.2 * (seed % 3)
        optimizer = hf_optim.create("am_sgd", [p], lr=lr, pull=pull, cap=1 - 1e-12)
        one_step(optimizer, first)
        d = optimizer.state[p]["d"].clone()
        moved = one_step(optimizer, g)

        def objective(s, g=g, d=d, lr=lr, pull=pull):
            planes = torch.maximum(s @ g, lr * (g @ d) + s @ d)
            return planes + (s.square().sum(1) + pull * (s + lr * d).square().sum(1)) / (2 * lr)

        assert_lowest(objective, moved)
        mu = (g.square().sum() / (g - d).square().sum()).item()
        inside += pull / (1 + pull) < mu < 1
    assert inside >= 3


@pytest.mark.parametrize(
    "g, mu",
    [(-1.0, 1 / 4), (0.5, 0.9), (0.999, 0.9), (1e-4, 0.1 / 1.1), (0.0, 0.1 / 1.1), (-3.0, 9 / 16)],
    ids=["against", "half", "cap", "small", "zero", "large"],
)
def test_am_sgd_coefficient(g, mu):
    p = zeros64(3)
    first, second = updates(hf_optim.create("am_sgd", [p], lr=1.0), [1.0, g])
    close(first, 1.0, rtol=1e-15)  # the first step is SGD
    close(second, mu + (1 - mu) * g, rtol=1e-12)


def test_am_sgd_of_a_repeated_gradient_does_not_divide_by_zero():
    p = zeros64(3)
    for u in updates(hf_optim.create("am_sgd", [p], lr=1.0), [2.0, 2.0, 2.0]):
        close(u, 2.0, rtol=1e-15)


@pytest.mark.parametrize("rule", ["am_sgd", "am_adamw"])
def test_adaptive_memory_without_gradient_stays(rule):
    p = zeros(6, 4)
    optimizer = hf_optim.create(rule, [p], lr=1.0)
    for _ in range(3):
        assert not one_step(optimizer, 0.0).any()
    moved = one_step(optimizer, 1.0)
    assert moved.isfinite().all() and moved.any()


def test_am_sgd_direction_does_not_hold_the_learning_rate():
    gradients = draws((6, 4), 8)
    found = []
    for rates in ([1.0] * 8, [1.0, 0.1, 0.0, 5.0, 0.0, 0.0, 2.0, 1.0]):
        p = zeros64(6, 4)
        optimizer = hf_optim.create("am_sgd", [p])
        for lr, g in zip(rates, gradients):
            optimizer.param_groups[0]["lr"] = lr
            one_step(optimizer, g)
        found.append(optimizer.state[p]["d"])
    assert torch.equal(found[0], found[1])


def test_am_sgd_without_memory_is_sgd():
    (p,), (q,) = make_params([(6, 4)]), make_params([(6, 4)])
    a, b = hf_optim.create("am_sgd", [p], pull=0.0, cap=0.0), SGD([q], momentum=0.0)
    advance(a, [p], 10), advance(b, [q], 10)
    assert torch.equal(p, q)


def test_am_sgd_scope():
    # model: one exploding tensor drives the coefficient of all; tensor: it does not
    for scope, mu in (("model", (1 + 400) / (4 + 900)), ("tensor", 1 / 4)):
        p, q = zeros64(1), zeros64(1)
        optimizer = hf_optim.create("am_sgd", [p, q], lr=1.0, scope=scope)
        one_step(optimizer, 1.0, 10.0)
        moved = one_step(optimizer, -1.0, -20.0)
        close(moved[0], -(mu * 1.0 + (1 - mu) * -1.0), rtol=1e-12)
        other = mu if scope == "model" else 400 / 900
        close(moved[1], -(other * 10.0 + (1 - other) * -20.0), rtol=1e-12)


# ---- AM-AdamW ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pull", [0.0, 0.1, 2.0])
def test_am_adamw_first_step(pull):
    g = torch.tensor([3.0, -0.5, 1e-4, 0.0], dtype=torch.float64)
    moved = one_step(hf_optim.create("am_adamw", [zeros64(4)], lr=0.1, pull=pull), g)
    size = g.abs() + 1e-8
    close(moved, -0.1 * g / (size * (1 + pull * (1 - 0.89) * size)), rtol=1e-10)


def test_am_adamw_minimises_the_larger_of_two_planes_in_its_metric():
    inside = 0
    for seed in range(12):
        first, g = draws((2,), 2, seed=seed)
        p, pull, cap, before, lr = zeros64(2), 0.3, 0.999, 0.2, (0.2, 0.05)[seed % 2]
        optimizer = hf_optim.create("am_adamw", [p], lr=before, pull=pull, cap=cap)
        one_step(optimizer, first)
        d, pi = optimizer.state[p]["d"].clone(), optimizer.state[p]["pi"].clone()
        optimizer.param_groups[0]["lr"] = lr
        moved = one_step(optimizer, g)
        P = (1 - cap * pi) * ((optimizer.state[p]["v"] / (1 - 0.999**2)).sqrt() + 1e-8)

        def objective(s, g=g, d=d, lr=lr, P=P, before=before, pull=pull):
            planes = torch.maximum(s @ g, before * (g @ (d / P)) + s @ d)
            return planes + (s.square() @ P + pull * (P * s + lr * d).square().sum(1)) / (2 * lr)

        beta = (optimizer.state[p]["pi"] / pi).item()
        if beta < cap:  # else the bound of beta, which the problem does not know, is active
            assert_lowest(objective, moved)
            inside += beta > 0
    assert inside >= 3


def test_am_adamw_at_lr_zero_stays_and_goes_on():
    (p,) = make_params([(6, 4)])
    optimizer = hf_optim.create("am_adamw", [p], lr=1e-2, weight_decay=0.1)
    advance(optimizer, [p], 3)
    held = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    advance(optimizer, [p], 3, first=4)
    assert torch.equal(p, held)
    optimizer.param_groups[0]["lr"] = 1e-2
    advance(optimizer, [p], 3, first=7)
    assert p.isfinite().all() and rms(p.detach() - held) < 0.1


def test_am_adamw_product_of_bf16_weights_survives_a_checkpoint():
    (p,) = make_params([(6, 4)], dtype=torch.bfloat16)
    optimizer = hf_optim.create("am_adamw", [p])
    advance(optimizer, [p], 5)
    saved = copy.deepcopy(optimizer.state_dict())
    other = hf_optim.create("am_adamw", make_params([(6, 4)], dtype=torch.bfloat16))
    other.load_state_dict(saved)
    (q,) = other.parameters()
    for key in ("pi", "lr_prev", "d", "v"):
        assert other.state[q][key].dtype == torch.float32
        assert torch.equal(other.state[q][key], optimizer.state[p][key])


# ---- diffGrad ------------------------------------------------------------------------------------------------------
def test_diffgrad_by_hand():
    p, seen = zeros64(1), []
    optimizer = hf_optim.create("diffgrad", [p], lr=1e-3)
    for g in (2.0, -1.0, -1.0):
        one_step(optimizer, g)
        seen.append(p.item())
    # eps of the source stands before the bias correction: 3e-7 of the first root of 2
    assert seen == pytest.approx([-8.807971e-4, -1.1345028e-3, -1.0979642e-3], rel=5e-7)


def test_diffgrad_keeps_a_copy_of_the_gradient():
    # a kept reference is overwritten by the next backward: no change is ever seen, and the friction is 1/2 for ever
    (p,), (q,) = make_params([(6, 4)]), make_params([(6, 4)])
    a, b = hf_optim.create("diffgrad", [p]), hf_optim.create("diffgrad", [q])
    for g in draws((6, 4), 6, dtype=torch.float32):
        a.zero_grad(set_to_none=False), b.zero_grad(set_to_none=True)
        for x, optimizer in ((p, a), (q, b)):
            (x * g).sum().backward()
            optimizer.step()
    assert torch.equal(p, q)


def test_diffgrad_of_small_gradients_is_half_of_adam():
    for change, xi in {1e-4: 0.500025, 1e-2: 0.5025, 1.0: 0.731}.items():
        p = zeros64(1)
        moved = one_step(hf_optim.create("diffgrad", [p], lr=1.0, eps=0.0), change)
        assert -moved.item() == pytest.approx(xi, rel=2e-4)


def test_diffgrad_relative_does_not_see_the_scale_of_the_gradient():
    results = []
    for scale in (1e-9, 1.0, 1e6):
        (p,) = make_params([(6, 4)], dtype=torch.float64)
        advance(hf_optim.create("diffgrad", [p], relative=True, eps=0.0), [p], 20, scale=scale)
        results.append(p.detach())
    close(results[0], results[1], rtol=1e-10)
    close(results[2], results[1], rtol=1e-10)


def test_diffgrad_relative_of_a_zero_gradient_stays():
    p = zeros(3)
    assert not one_step(hf_optim.create("diffgrad", [p], relative=True, lr=1.0), 0.0).any()


# ---- AdaMomentum ---------------------------------------------------------------------------------------------------
def test_adamomentum_first_steps_are_large():
    found = constant(hf_optim.create("adamomentum", [zeros64(1)], lr=1.0), 2.0, 5)
    assert found == pytest.approx([10, 6.59, 5.01, 4.10, 3.51], rel=2e-3)
    assert found[0] == pytest.approx(10, rel=1e-9)


def test_adamomentum_first_step_with_the_papers_eps():
    moved = one_step(hf_optim.create("adamomentum", [zeros64(1)], lr=1e-3, eps=1e-8), 2.0)
    assert moved.item() == pytest.approx(-9.9987502e-3, rel=1e-8)


def test_adamomentum_corrected_steps_by_lr_for_a_constant_gradient():
    optimizer = hf_optim.create("adamomentum", [zeros64(1)], lr=1.0, v_input="corrected")
    assert constant(optimizer, 0.3, 30) == pytest.approx([1.0] * 30, rel=1e-9)


def test_adamomentum_eps_is_a_floor():
    for g, eps, size in ((1e-4, 1e-8, 0.0316), (1e-3, 1e-8, 0.3015), (1e-4, 1e-16, 1.0), (1e-9, 1e-16, 3.16e-3)):
        optimizer = hf_optim.create("adamomentum", [zeros64(1)], lr=1.0, eps=eps, v_input="corrected")
        for u in constant(optimizer, g, 5):
            assert u == pytest.approx(size, rel=2e-3)


# ---- AdaNorm -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps, grow", [(1, 1.0), (30, 1.0), (30, 1.1)])
def test_adanorm_of_a_gradient_that_does_not_shrink_is_adam(steps, grow):
    (p,), (q,) = make_params([(6, 4)]), make_params([(6, 4)])
    a, b = hf_optim.create("adanorm", [p]), hf_optim.AdamW([q])
    g = torch.randn(6, 4)
    for t in range(steps):
        one_step(a, g * grow**t), one_step(b, g * grow**t)
    assert torch.equal(p, q)


@pytest.mark.parametrize("share, factor", [(0.0501, 1.0), (0.0499, 0.05 * (0.95 / 0.0499 + 1)), (0.01, 0.05 * 96)])
def test_adanorm_scales_up_where_the_norm_fell_below_its_average(share, factor):
    p = zeros64(3)
    optimizer, g = hf_optim.create("adanorm", [p], beta1=0.0), torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    one_step(optimizer, g)
    one_step(optimizer, share * g)
    close(optimizer.state[p]["m"], factor * share * g, rtol=1e-12)
    close(optimizer.state[p]["e"], 3 * (0.95 * 0.05 + 0.05 * share), rtol=1e-12)
    close(optimizer.state[p]["v"], (0.999e-3 + 1e-3 * share**2) * g.square(), rtol=1e-12)  # of the plain gradient


def test_adanorm_gradient_that_becomes_zero_is_not_nan():
    p = zeros(6, 4)
    optimizer = hf_optim.create("adanorm", [p])
    one_step(optimizer, torch.randn(6, 4))
    for _ in range(3):
        one_step(optimizer, 0.0)
    assert p.isfinite().all() and optimizer.state[p]["e"] > 0


def test_adanorm_amplification_is_bounded():
    # the factor is one for the tensor, v is per entry: an entry whose large neighbour goes silent is scaled by both
    def largest(**options):
        p = zeros64(2)
        gradients = [torch.tensor([1.0, 1e-4])] * 200 + [torch.tensor([0.0, 1e-4])] * 200
        found = updates(hf_optim.create("adanorm", [p], lr=1.0, **options), [g.double() for g in gradients])
        return [u[1].item() for u in found]

    assert max(largest()) == pytest.approx(10, rel=1e-3)
    without = largest(largest=1e12)
    assert max(without) > 1000 and sum(u > 10 for u in without) > 100


# ---- fractional AdamW ----------------------------------------------------------------------------------------------
def fractional(gradients, alpha, memory):
    """The sums D_1, D_2, ...: without beta1 the average gradient is the last of them."""
    p, found = zeros64(1), []
    optimizer = hf_optim.create("fractional_adamw", [p], beta1=0.0, alpha=alpha, memory=memory)
    for g in gradients:
        one_step(optimizer, g)
        found.append(optimizer.state[p]["m"].item())
    return torch.tensor(found, dtype=torch.float64)


def kernel(alpha):
    """w_0 ... w_10 from the differences c_j = (-1)^j binomial(alpha, j): w_j = c_{j+1} / c_1."""
    c = [1.0]
    for j in range(1, 12):
        c.append(c[-1] * (j - 1 - alpha) / j)
    return torch.tensor([x / c[1] for x in c[1:]], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_fractional_impulse_replays_the_weights(alpha):
    response = fractional([1.0] + [0.0] * 12, alpha, "window")
    close(response[:11], kernel(alpha), rtol=1e-12)
    assert not response[11:].any()


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_fractional_weights_are_those_of_the_difference(alpha):
    close(torch.tensor([1.0, *weights(alpha)], dtype=torch.float64), kernel(alpha), rtol=1e-13)


def test_fractional_sums_of_a_constant_gradient():
    for alpha, total in {0.1: 2.667, 0.3: 2.094, 0.5: 1.664, 0.7: 1.340, 0.9: 1.098, 1.0: 1.0}.items():
        response = fractional([1.0] * 13, alpha, "window")
        close(response[:11], kernel(alpha).cumsum(0), rtol=1e-12)
        assert response[-1].item() == pytest.approx(total, abs=6e-4)


@pytest.mark.parametrize("memory", ["window", "exponential"])
def test_fractional_of_order_one_is_adamw(memory):
    (p,), (q,) = make_params([(6, 4)]), make_params([(6, 4)])
    a = hf_optim.create("fractional_adamw", [p], alpha=1.0, memory=memory, weight_decay=0.1)
    b = hf_optim.AdamW([q], weight_decay=0.1)
    advance(a, [p], 20), advance(b, [q], 20)
    assert torch.equal(p, q)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_fractional_exponentials_fit_the_window(alpha):
    response, wanted = fractional([1.0] + [0.0] * 10, alpha, "exponential")[1:], kernel(alpha)[1:]
    assert ((response - wanted).norm() / wanted.norm()).item() < 0.012
    assert (response > 0).all() and (response.diff() < 0).all()


# ---- spectral AdamW ------------------------------------------------------------------------------------------------
def largest_singular_value(x):
    return torch.linalg.svdvals(x.detach().double().flatten(1))[0].item()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 1), (1, 9)])
def test_spectral_norm_of_a_kept_vector_is_the_largest_singular_value(shape):
    (x,), vector, sizes = make_params([shape], dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64), []
    for _ in range(200):
        size, vector = spectral_norm(x.detach(), vector)
        sizes.append(size.item())
    wanted = largest_singular_value(x)
    assert sizes[-1] == pytest.approx(wanted, rel=1e-9)
    assert all(s <= wanted * (1 + 1e-12) for s in sizes) and sizes[0] > 0.6 * wanted


def test_spectral_norm_recovers_from_a_zero_matrix():
    # the vector would become 0, then NaN, and min(lr, NaN) is lr: the cap off for ever
    vector = torch.zeros(5)
    for x in (torch.zeros(7, 5), torch.zeros(7, 5)):
        size, vector = spectral_norm(x, vector)
        assert size == 0 and vector.isfinite().all() and vector.any()
    x = torch.randn(7, 5)
    for _ in range(50):
        size, vector = spectral_norm(x, vector)
    assert size.item() == pytest.approx(largest_singular_value(x), rel=1e-4)


def test_spectral_step_is_bounded_by_the_weights():
    (p,) = make_params([(20, 30)], dtype=torch.float64)
    optimizer, tight = hf_optim.create("spectral_adamw", [p], lr=1.0, tau=0.01), 0
    for t, g in enumerate(draws((20, 30), 60, seed=5)):
        before = largest_singular_value(p)
        moved = largest_singular_value(one_step(optimizer, g)) / before
        assert moved <= 0.01 * (1.35 if t < 3 else 1.25)  # two iterations underestimate: less so once warm
        assert largest_singular_value(p) <= before * (1 + 0.01 * (1.35 if t < 3 else 1.25))
        tight += moved > 0.009
    assert tight > 50


def test_spectral_bound_of_a_constant_gradient_is_exact():
    (p,) = make_params([(20, 30)], dtype=torch.float64)
    optimizer, (g,) = hf_optim.create("spectral_adamw", [p], lr=1e-2, tau=1e-4), draws((20, 30), 1, seed=5)
    for _ in range(150):
        before = largest_singular_value(p)
        moved = one_step(optimizer, g)
    assert largest_singular_value(moved) == pytest.approx(1e-4 * before, rel=1e-6)


def test_spectral_keeps_its_vectors():
    (p,) = make_params([(20, 30)], dtype=torch.float64)
    optimizer, (g,) = hf_optim.create("spectral_adamw", [p], lr=1e-12), draws((20, 30), 1)
    for _ in range(150):
        one_step(optimizer, g)
    for key, x in (("x_p", p.detach()), ("x_u", g.sign())):
        top = torch.linalg.svd(x)[2][0]
        assert abs(top @ optimizer.state[p][key]).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_spectral_without_tau_is_adamw(decay):
    ours, theirs = make_params([(6, 4), (5,)]), make_params([(6, 4), (5,)])
    a = hf_optim.create("spectral_adamw", ours, lr=0.1, tau=None, weight_decay=decay)
    advance(a, ours, 10), advance(hf_optim.AdamW(theirs, lr=0.1, weight_decay=decay), theirs, 10)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


def test_spectral_vectors_are_not_bounded():
    (p,), (q,) = make_params([(9,)]), make_params([(9,)])
    advance(hf_optim.create("spectral_adamw", [p], lr=0.1, tau=1e-9), [p], 5)
    advance(hf_optim.AdamW([q], lr=0.1), [q], 5)
    assert torch.equal(p, q)


def test_spectral_zero_weights_move_by_the_floor():
    p = zeros64(20, 30)
    optimizer = hf_optim.create("spectral_adamw", [p], lr=1.0, tau=0.1)
    moved = one_step(optimizer, draws((20, 30), 1)[0])
    assert largest_singular_value(moved) == pytest.approx(0.1 * 1e-3 * (20**0.5 + 30**0.5), rel=0.35)
    for g in draws((20, 30), 30, seed=2):
        one_step(optimizer, g)
    assert p.isfinite().all() and largest_singular_value(p) > 1e-3


def test_spectral_zero_weights_without_floor_stay_and_are_not_nan():
    p = zeros(20, 30)
    optimizer = hf_optim.create("spectral_adamw", [p], lr=1.0, floor=0.0)
    for g in draws((20, 30), 5, dtype=torch.float32):
        one_step(optimizer, g)
    assert not p.any() and all(x.isfinite().all() for x in optimizer.state[p].values() if torch.is_tensor(x))


def test_spectral_survives_a_first_gradient_of_zero():
    (p,) = make_params([(20, 30)])
    optimizer = hf_optim.create("spectral_adamw", [p], lr=1.0)
    assert not one_step(optimizer, 0.0).any()
    for g in draws((20, 30), 20, dtype=torch.float32):
        before = largest_singular_value(p)
        assert largest_singular_value(one_step(optimizer, g)) < 0.014 * before


def test_spectral_of_a_model_leaves_embedding_and_head_alone():
    net = Net()
    groups, _ = param_groups(SpectralAdamW, net, {"tau": 0.02})
    free = {id(p) for group in groups if "tau" in group and group["tau"] is None for p in group["params"]}
    assert free == {id(net.embed.weight), id(net.head.weight), id(net.head.bias)}


# ---- Muon ----------------------------------------------------------------------------------------------------------
class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4, 6))


class Net(torch.nn.Module):
    """One of every kind of weight that Muon has to tell apart."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.hidden, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
        self.short = torch.nn.Conv1d(4, 4, 3)
        self.image = torch.nn.Conv2d(4, 4, 3)
        self.experts = Experts()
        self.adapter = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 2, bias=False)})
        self.head = torch.nn.Linear(4, 10)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head


def with_muon(net, groups):
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)] for group in groups if group["rule"] == "muon" for p in group["params"]}


@pytest.mark.parametrize("tied", [False, True])
def test_muon_of_a_model_takes_hidden_matrices_only(tied):
    net = Net(tied)
    groups, options = param_groups(Muon, net, {"lr": 0.1, "adamw_lr": 0.01})
    assert with_muon(net, groups) == {"hidden.weight", "image.weight", "experts.weight"}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert {group["rule"]: group.get("lr") for group in groups} == {"muon": None, "adamw": 0.01}
    optimizer = Muon(groups, **options)
    assert {g["rule"]: g["lr"] for g in optimizer.param_groups} == {"muon": 0.1, "adamw": 0.01}
    advance(optimizer, list(net.parameters()), 2)
    assert set(optimizer.state[net.hidden.weight]) == {"step", "b"}
    assert set(optimizer.state[net.embed.weight]) == {"step", "m", "v"}


def test_muon_head_without_get_output_embeddings_is_the_last_matrix():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    assert with_muon(net, param_groups(Muon, net, {})[0]) == {"0.weight"}


def test_muon_of_target_modules_only():
    net = Net()
    groups, _ = param_groups(Muon, net, {}, is_target=lambda name, module: name in ("hidden", "head"))
    assert with_muon(net, groups) == {"hidden.weight"}  # the head stays AdamW's even where it is named


def test_muon_keeps_trainers_decay_apart():
    net = Net()
    groups, _ = param_groups(Muon, net, {}, decay={"hidden.weight", "embed.weight"})
    kept = {id(p) for group in groups if "weight_decay" not in group for p in group["params"]}
    assert kept == {id(net.hidden.weight), id(net.embed.weight)}


def test_muon_of_parameters_warns_and_of_a_model_does_not(caplog):
    for params, warned in (([zeros(4, 4)], True), ([zeros(4)], False), (Net(), False)):
        caplog.clear()
        optimizer = hf_optim.create("muon", params)
        with caplog.at_level(logging.WARNING, logger="hf_optim"):
            advance(optimizer, list(optimizer.parameters()), 2)
        assert sum("pass the model" in r.message for r in caplog.records) == warned


def test_muon_adamw_lr_needs_the_model():
    with pytest.raises(ValueError, match="`adamw_lr=0.1` cannot act on Muon: .*build the optimizer from the model"):
        hf_optim.create("muon", [zeros(4, 4)], adamw_lr=0.1)


def orthogonal(x, steps=5, iterate_in="float32"):
    return orthogonalize(x, View({"steps": steps, "iterate_in": iterate_in}))


@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12)])
def test_muon_singular_values(shape):
    (x,) = make_params([shape], dtype=torch.float64)
    u, _, v = torch.linalg.svd(x.detach(), full_matrices=False)
    s = torch.logspace(0, -2, 12, dtype=torch.float64)  # relative to the norm: all above 0.003
    y = orthogonal((u * s @ v).float())
    found = torch.linalg.svdvals(y.double())
    assert 0.68 < found.min() and found.max() < 1.21
    aligned = torch.diag(u.mT @ y.double() @ v.mT)
    close(aligned, found.sort(descending=True)[0][aligned.argsort(descending=True).argsort()], rtol=1e-3)


def test_muon_scalar_map_of_small_singular_values():
    for size, wanted in {1e-3: 0.47, 1e-4: 0.048}.items():
        x = torch.diag(torch.tensor([1.0, size], dtype=torch.float64))
        assert orthogonal(x)[1, 1].item() == pytest.approx(wanted, rel=0.03)


def test_muon_zero_gradient_does_not_move():
    p = zeros(6, 9)
    optimizer = hf_optim.create("muon", [p], lr=1.0)
    assert not one_step(optimizer, 0.0).any()
    assert one_step(optimizer, torch.randn(6, 9)).isfinite().all()


def test_muon_does_not_see_the_scale_of_the_gradient():
    # eps added to the norm lets updates shrink where gradients are tiny
    found = []
    for scale in (2.0**-50, 1.0, 2.0**40):
        (p,) = make_params([(6, 9)])
        advance(hf_optim.create("muon", [p], lr=0.1), [p], 5, scale=scale)
        found.append(p.detach())
    close(found[0], found[1].double(), rtol=1e-4, atol=1e-5)
    close(found[2], found[1].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_muon_entries_move_by_a_fifth_of_lr(shape):
    p = zeros(*shape)
    optimizer = hf_optim.create("muon", [p], lr=0.5)
    for g in draws(shape, 4, dtype=torch.float32):
        assert rms(one_step(optimizer, g)).item() == pytest.approx(0.2 * 0.5 * 0.9, rel=0.15)


def test_muon_original_scale():
    for shape, factor in (((24, 6), 2.0), ((6, 24), 1.0)):
        p, q = zeros64(*shape), zeros64(*shape)
        g = draws(shape, 1)[0]
        a = one_step(hf_optim.create("muon", [p], lr=1.0, scale="original"), g)
        b = one_step(hf_optim.create("muon", [q], lr=1.0), g)
        close(a, b * factor / (0.2 * 24**0.5), rtol=1e-12)


def test_muon_decay_is_multiplied_by_the_plain_lr():
    p = torch.nn.Parameter(torch.full((24, 6), 2.0, dtype=torch.float64))
    one_step(hf_optim.create("muon", [p], lr=0.1, weight_decay=0.5), 0.0)
    close(p, 1.9, rtol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_stacked_experts_are_matrices_one_by_one(nesterov):
    stack = zeros64(3, 6, 9)
    alone = [zeros64(6, 9) for _ in range(3)]
    a = hf_optim.create("muon", [stack], lr=1.0, nesterov=nesterov)
    b = hf_optim.create("muon", alone, lr=1.0, nesterov=nesterov)
    for g in draws((3, 6, 9), 4):
        g[1] *= 1e4  # a shared norm would shrink the other experts
        moved, wanted = one_step(a, g), one_step(b, *g)
        close(moved, torch.stack(wanted), rtol=1e-9, atol=1e-9)


def test_muon_convolution_is_the_matrix_of_its_filters():
    kernel, matrix = zeros64(6, 2, 3, 3), zeros64(6, 18)
    a, b = hf_optim.create("muon", [kernel], lr=1.0), hf_optim.create("muon", [matrix], lr=1.0)
    for g in draws((6, 2, 3, 3), 4):
        close(one_step(a, g), one_step(b, g.flatten(1)).view(6, 2, 3, 3), rtol=1e-12)


def test_muon_in_bf16_is_near_fp32():
    for shape in ((24, 24), (64, 160), (160, 64)):
        gaps = []
        for seed in range(5):
            (x,) = make_params([shape], seed=seed)
            exact, rough = orthogonal(x.detach()), orthogonal(x.detach(), iterate_in="bfloat16")
            assert rough.dtype == torch.float32
            gaps.append(((rough - exact).norm() / exact.norm()).item())
        assert 1e-3 < min(gaps) and max(gaps) < 0.03


def test_muon_in_bf16_keeps_singular_values():
    for shape in ((96, 96), (64, 160), (160, 64)):
        (x,) = make_params([shape])
        exact, rough = orthogonal(x.detach()), orthogonal(x.detach(), iterate_in="bfloat16")
        close(torch.linalg.svdvals(rough), torch.linalg.svdvals(exact).double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_touches_neither_gradient_nor_average(nesterov, dtype):
    # elsewhere the in-place normalisation hits the momentum buffer (bf16, no nesterov) or the gradient
    p = zeros(6, 9, dtype=dtype)
    optimizer, (g,) = hf_optim.create("muon", [p], nesterov=nesterov), draws((6, 9), 1, dtype=dtype)
    p.grad = g.clone()
    optimizer.step()
    assert torch.equal(p.grad, g)
    close(optimizer.state[p]["b"], 0.05 * g.double(), rtol=1e-6)


def test_muon_momentum_by_hand():
    for nesterov, second in ((True, lambda b, g: 0.95 * b + 0.05 * g), (False, lambda b, g: b)):
        p = zeros64(6, 9)
        first, g = draws((6, 9), 2)
        u = updates(hf_optim.create("muon", [p], lr=1.0, nesterov=nesterov), [first, g])[1]
        b = 0.95 * 0.05 * first + 0.05 * g
        close(u, 0.2 * 3.0 * orthogonal(second(b, g)), rtol=1e-10)


def test_muon_vectors_are_adamws():
    (p,), (q,) = make_params([(9,)]), make_params([(9,)])
    advance(hf_optim.create("muon", [p], lr=0.1), [p], 5)
    advance(hf_optim.AdamW([q], lr=0.1, beta2=0.95), [q], 5)
    assert torch.equal(p, q)


def test_muon_moves_a_lora_factor_whose_partner_is_zero():
    # A's gradient is exactly 0 at the first step
    a, b = zeros(2, 8), zeros(8, 2)
    optimizer = hf_optim.create("muon", [{"params": [a, b], "rule": "muon"}], lr=0.1)
    moved = one_step(optimizer, 0.0, torch.randn(8, 2))
    assert not moved[0].any() and moved[1].any() and moved[1].isfinite().all()
