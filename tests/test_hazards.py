# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What went wrong elsewhere, or nearly here: one named test for each way that a rule or a flag can fail."""

import copy
import math

import oracles
import pytest
import torch
from conftest import advance, fill_grads, make_params
from torch.optim.lr_scheduler import LambdaLR

import hf_optim
from hf_optim.core import pack_signs, rms, with_signs
from hf_optim.core.pipeline import View
from hf_optim.optim.smmf import factors
from hf_optim.transforms import CautiousDecay


def zeros(*shape, dtype=torch.float32):
    """Weights at 0: after a step with lr 1 they are the negative of the update, without rounding."""
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def one_step(optimizer, *gradients, **step):
    """Step with these gradients; returns by how much each parameter moved."""
    params = list(optimizer.parameters())
    old = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients):
        p.grad = g if isinstance(g, torch.Tensor) else torch.full_like(p, g)
    optimizer.step(**step)
    moved = [p.detach() - o for p, o in zip(params, old)]
    return moved[0] if len(moved) == 1 else moved


def close(a, b, rtol=1e-6, atol=0.0):
    b = torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a.detach().double(), b.expand_as(a), rtol=rtol, atol=atol)


def keys(optimizer):
    """Names of the state buffers of each parameter."""
    return [set(state) - {"step"} for state in optimizer.state.values()]


# ---- all -----------------------------------------------------------------------------------------------------------
def test_the_transpose_of_a_matrix_is_stepped_alike(name):
    # a statistic over the wrong axis shows where there are more rows than columns, or the other way round
    turned = getattr(oracles.load(name), "TRANSPOSE", {})
    if turned is None:
        pytest.skip("rows and columns differ by its definition")
    for shape in [(24, 10), (10, 24)]:
        (p,) = make_params([shape])
        q = torch.nn.Parameter(p.detach().T.clone())
        a, b = hf_optim.create(name, [p]), hf_optim.create(name, [q], **turned)
        for t in range(20):
            (g,) = fill_grads([p], seed=t)
            q.grad = g.T.clone()
            for optimizer in (a, b):
                optimizer.step(loss=2.0 if optimizer.needs_loss else None)
        close(q.T, p.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_dtype_leaks_to_the_next_parameter(name, first):
    # an eps chosen from the dtype of the first tensor stuck to all others in two packages
    alone, (p,) = make_params([(6, 4)], seed=1), make_params([(6, 4)], seed=1)
    other = make_params([(5, 3)], dtype=first)
    own = {"scope": "tensor"} if "scope" in hf_optim.info(name).options else {}  # am_sgd: one number for the model
    advance(hf_optim.create(name, alone, **own), alone, 10, scale=1e-3)
    mixed = hf_optim.create(name, [*other, p], **own)
    for t in range(1, 11):
        fill_grads(other, seed=t + 100)
        advance(mixed, [p], 1, first=t, scale=1e-3)
    assert torch.equal(alone[0], p)


def test_a_tiny_decay_is_not_rounded_away():
    # 1 - lr * weight_decay is 1 in fp32 below 2^-25: a learning rate of 1e-6 with a decay of 0.01 did nothing.
    # Updates of a few units in the last place dither the rounding of what decays.
    from_loss = {"mode": "loss", "kappa": 1.0, "beta2": 0.0}  # the step size is the loss
    rules = {"adamw": {}, "adafactor_corrected": {}, "sm3": {"beta": 0.9}, "smmf": {}, "nsgda": {"scale": "rms"}}
    for name, options in (rules | {"adalo": from_loss}).items():
        p, q = [torch.nn.Parameter(torch.linspace(0.5, 1.5, 4000)) for _ in range(2)]
        pair = [hf_optim.create(name, [x], lr=1e-6, weight_decay=d, **options) for x, d in ((p, 0.01), (q, 0.0))]
        for t in range(100):
            p.grad = torch.randn(4000, generator=torch.Generator().manual_seed(t))
            q.grad = p.grad.clone()
            for optimizer in pair:
                optimizer.step(loss=1e-6 if optimizer.needs_loss else None)
        assert (q - p).mean().item() == pytest.approx(100 * 1e-6 * 0.01, rel=0.1), name


@pytest.mark.parametrize(
    "rule, option, value, needs",
    [
        ("adafactor_corrected", "warmup_init", True, {"relative_step": True}),
        ("adafactor_corrected", "eps2", 0.1, {"scale_parameter": True}),
        ("smmf", "growth", 0.9, {"beta1": 0.9}),
    ],
)
def test_an_option_that_needs_another_is_refused_without_it(rule, option, value, needs):
    (other,) = needs
    without = {"beta1": None} if other == "beta1" else {}
    with pytest.raises(ValueError, match=f"`{option}={value}` cannot act on .*: it needs `{other}`"):
        hf_optim.create(rule, [zeros(3)], **{option: value}, **without)
    assert hf_optim.create(rule, [zeros(3)], **{option: value}, **needs)


# ---- AdamW ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_adamw_equals_torch(dtype, atol, weight_decay):
    # torch in float64: in fp32 it rounds 1 - lr * weight_decay, the same way at every step, 1e-6 in 50 of them
    ours, theirs = make_params([(20, 30), (7,), ()], dtype), make_params([(20, 30), (7,), ()], dtype)
    theirs = [torch.nn.Parameter(q.detach().double()) for q in theirs]
    a = hf_optim.AdamW(ours, lr=1e-2, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=weight_decay)
    b = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=weight_decay)
    for t in range(50):
        for q, g in zip(theirs, fill_grads(ours, seed=t)):
            q.grad = g.double()
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        close(p, q, rtol=atol, atol=atol)


def test_adamw_first_step_by_hand():
    p = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    one_step(hf_optim.AdamW([p], lr=0.1, weight_decay=0.5), 3.0)
    close(p, 1.9 - 0.1 * 3 / (3 + 1e-8), rtol=1e-15)


@pytest.mark.parametrize("precision", ["kahan", "stochastic"])
def test_bf16_weights_keep_decaying(precision):
    # 1e-4 of a bf16 weight is far below half a unit in its last place: rounded to nearest it never moves
    p = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    optimizer = hf_optim.AdamW([p], lr=0.1, weight_decay=1e-3, precision=precision)
    for _ in range(1000):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(math.exp(-0.1), rel=3e-3)


# ---- Adafactor -----------------------------------------------------------------------------------------------------
def factored_errors(backend):
    """Relative errors of g / sqrt(V) on the 30 matrices whose gradients span 24 orders of magnitude."""
    p = zeros(512, 768)
    optimizer = hf_optim.Adafactor([p], lr=1.0, clip_threshold=1e30, backend=backend)
    g0 = make_params([(512, 768)], seed=3)[0].detach()
    wide = (2 * torch.randn(512, 1)).exp() * (2 * torch.randn(1, 768)).exp()
    for spread in (1.0, wide):
        for exponent in range(-12, 18, 2):
            g = g0 * spread * 10.0**exponent
            g[5], g[:, 7] = 0, 0
            if g.abs().max() > 1e15:
                yield None  # counts as an overflow
                continue
            p.data.zero_()
            optimizer.state.clear()
            u = -one_step(optimizer, g).double()
            assert u.isfinite().all(), exponent
            assert not u[5].any() and not u[:, 7].any()
            row, col = optimizer.state[p]["row"].double(), optimizer.state[p]["col"].double()
            assert torch.isclose(row.mean(), col.mean(), rtol=1e-6)  # one mean, up to the rounding of the statistics
            exact = g.double() / (torch.outer(row, col) / col.mean()).sqrt()
            live = g != 0
            yield ((u - exact) / exact)[live].abs()


@pytest.mark.parametrize("backend, flush", [("loop", False), ("loop", True), ("fused", True)])
def test_adafactor_inverse_root(backend, flush):
    # a dead row crossed with a dead column made the ratio of statistics overflow: 0 * inf, then NaN everywhere
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("no flush-to-zero here")
    try:
        errors = list(factored_errors(backend))
    finally:
        torch.set_flush_denormal(False)
    measured = [e for e in errors if e is not None]
    assert len(measured) >= 24
    assert max(e.max().item() for e in measured) <= 2.4e-7
    assert max(e.mean().item() for e in measured) <= 5e-8


def test_adafactor_first_step_of_a_rank_one_gradient_is_a_sign():
    u, v = torch.rand(6).add(0.1), torch.rand(9).add(0.1)
    sign = torch.randn(6, 9).sign()
    p, q = zeros(6, 9), zeros(9)
    a, b = one_step(hf_optim.Adafactor([p, q], lr=1.0), torch.outer(u, v) * sign, v * sign[0])
    close(a, -sign.double())
    close(b, -sign[0].double())


def test_adafactor_update_is_clipped():
    for threshold in (1.0, 0.3):
        p = zeros(40, 30)
        optimizer = hf_optim.Adafactor([p], lr=1.0, clip_threshold=threshold)
        sizes = []
        for t in range(1, 20):  # growing gradients: the averages lag, the raw update is larger than 1
            moved = one_step(optimizer, torch.randn(40, 30) * 3.0**t)
            sizes.append(rms(moved).item())
        assert max(sizes) <= threshold * (1 + 1e-5)
        assert max(sizes) == pytest.approx(threshold, rel=1e-5)


def test_adafactor_factors_the_two_longest_axes():
    shapes = {
        (64, 32, 3, 3): [(64, 3, 3), (32, 3, 3)],  # a convolution: its channels
        (8, 64, 32): [(8, 64), (8, 32)],  # experts: the matrices
        (3, 5, 5): [(3, 5), (3, 5)],
        (7, 2, 9): [(7, 2), (2, 9)],
        (1, 9): [(1,), (9,)],
    }
    for shape, wanted in shapes.items():
        p = zeros(*shape)
        optimizer = hf_optim.Adafactor([p])
        one_step(optimizer, torch.randn(shape))
        assert [tuple(optimizer.state[p][name].shape) for name in ("row", "col")] == wanted
        assert keys(optimizer) == [{"row", "col"}]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("relative_step", [False, True])
def test_adafactor_agrees_with_transformers(relative_step, scale_parameter, decay):
    from transformers.optimization import Adafactor

    shapes, lr = [(8, 16), (1, 9), (9, 1), (7,), ()], None if relative_step else 1e-2
    ours, theirs = make_params(shapes), make_params(shapes)
    options = {"relative_step": relative_step, "scale_parameter": scale_parameter, "weight_decay": decay}
    a, b = hf_optim.Adafactor(ours, lr=lr, **options), Adafactor(theirs, lr=lr, **options)
    for t in range(30):
        fill_grads(ours, seed=t), fill_grads(theirs, seed=t)
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        close(p, q.double(), rtol=2e-6, atol=2e-6)


def test_adafactor_momentum_agrees_with_transformers_while_lr_is_constant():
    from transformers.optimization import Adafactor

    ours, theirs = make_params([(8, 16), (7,)]), make_params([(8, 16), (7,)])
    options = {"lr": 1e-2, "beta1": 0.9, "relative_step": False, "scale_parameter": False}
    a, b = hf_optim.Adafactor(ours, **options), Adafactor(theirs, **options)
    for t in range(30):
        fill_grads(ours, seed=t), fill_grads(theirs, seed=t)
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        close(p, q.double(), rtol=2e-6, atol=2e-6)


def test_adafactor_momentum_follows_the_schedule_at_once():
    # an average of updates with the step size in them keeps moving for 1 / (1 - beta1) steps after lr is 0
    p = make_params([(8, 16)])[0]
    optimizer = hf_optim.Adafactor([p], lr=1e-2, beta1=0.9)
    advance(optimizer, [p], 5)
    optimizer.param_groups[0]["lr"] = 0.0
    assert not one_step(optimizer, torch.randn(8, 16)).any()


def test_adafactor_statistics_have_one_mean():
    (p,) = make_params([(6, 9)])
    optimizer = hf_optim.Adafactor([p])
    for t in range(1, 20):
        advance(optimizer, [p], 1, first=t, scale=t)
        close(optimizer.state[p]["row"].mean(), optimizer.state[p]["col"].mean().double())


def test_adafactor_starts_zero_weights_at_eps2():
    p = zeros(20, 30)
    moved = one_step(hf_optim.Adafactor([p], relative_step=True, scale_parameter=True), torch.randn(20, 30))
    assert rms(moved).item() == pytest.approx(1e-2 * 1e-3, rel=0.05)


def test_statistics_of_bf16_weights_stay_fp32(name):
    # a bf16 average cannot fall below w < 2^-9 of itself, and a bf16 sum of ones stops at 256
    (p,) = make_params([(6, 4)], dtype=torch.bfloat16)
    optimizer = hf_optim.create(name, [p])
    advance(optimizer, [p], 2)
    dtypes = {x.dtype for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)}
    assert dtypes <= {torch.float32, torch.uint8} and torch.float32 in dtypes


# ---- SM3 -----------------------------------------------------------------------------------------------------------
def test_sm3_covers_the_sum_of_squares_and_no_more_than_the_first_variant():
    p = zeros(6, 9)
    optimizer, total, first = hf_optim.SM3([p]), torch.zeros(6, 9), [torch.zeros(6), torch.zeros(9)]
    for _ in range(50):
        g = torch.randn(6, 9) * torch.rand(6, 1)
        one_step(optimizer, g)
        total += g.square()
        first = [first[0] + g.square().amax(1), first[1] + g.square().amax(0)]  # SM3-I
        state = optimizer.state[p]
        cover = torch.minimum(state["A0"][:, None], state["A1"])
        assert (total <= cover * (1 + 1e-5)).all()
        assert (cover <= torch.minimum(first[0][:, None], first[1]) * (1 + 1e-5)).all()
    assert (cover > total * 1.5).any()  # it is a bound, not the sum


def test_sm3_first_step_is_a_sign_and_zero_entries_stay():
    g = torch.randn(6, 9)
    g[2], g[:, 3], g[0, 0] = 0, 0, 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # an added 1e-30 is 0 in fp16: 0 / 0
        moved = one_step(hf_optim.SM3([zeros(6, 9, dtype=dtype)], lr=1.0), g.to(dtype))
        close(moved, -g.sign().double(), rtol=2e-7)


def test_sm3_of_vectors_is_adagrad():
    ours, theirs = make_params([(9,), ()]), make_params([(9,), ()])
    a, b = hf_optim.SM3(ours, lr=0.1), torch.optim.Adagrad(theirs, lr=0.1, eps=1e-15)
    for t in range(20):
        fill_grads(ours, seed=t), fill_grads(theirs, seed=t)
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        close(p, q.double(), rtol=3e-7, atol=3e-7)  # g * rsqrt(nu) and g / sqrt(nu) differ in the last place


def test_sm3_of_a_constant_gradient_falls_as_the_root_of_time():
    optimizer = hf_optim.SM3([zeros(3, 4, dtype=torch.float64)], lr=1.0)
    for t in range(1, 20):
        close(one_step(optimizer, 0.7), -(t**-0.5), rtol=1e-12)


def test_sm3_keeps_no_momentum_unless_asked():
    for options, wanted in (({}, {"A0", "A1"}), ({"momentum": 0.9}, {"A0", "A1", "m"})):
        optimizer = hf_optim.SM3([zeros(6, 9)], **options)
        one_step(optimizer, 1.0)
        assert keys(optimizer) == [wanted]


def test_sm3_average_recovers_from_a_spike():
    # two ports keep the larger of old and new accumulator: the step stays at 3e-4 for ever
    optimizer = hf_optim.SM3([zeros(3, 4)], lr=1.0, beta=0.9)
    one_step(optimizer, 100.0)
    for _ in range(199):
        moved = one_step(optimizer, 0.01)
    close(moved, -0.996, rtol=1e-3)


# ---- Amos ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_amos_first_step(size):
    # |g| = 1e-9: an eps of 1e-18 added to v makes the step 3 % of what it should be
    xi, lam = 0.1, 0.02
    p, g = make_params([(6, 9)], dtype=torch.float64)[0], torch.randn(6, 9).double()
    old, q = p.detach().clone(), g.square().mean(1, keepdim=True)
    optimizer = hf_optim.Amos([p], lr=xi, weight_decay=lam / xi, eta=0.3)
    one_step(optimizer, size * g)
    close(p, old * (1 - xi**2 / 2 - lam) - xi * 0.3 * g / q.sqrt(), rtol=1e-12)
    close(optimizer.state[p]["b"], xi**2, rtol=1e-12)
    q = zeros(6, 9)  # the same in fp32
    close(
        one_step(hf_optim.Amos([q], lr=xi, eta=0.3), (size * g).float()),
        -xi * 0.3 * g / g.square().mean(1, True).sqrt(),
    )


def test_amos_does_not_see_the_scale_of_the_gradient():
    results = []
    for scale in (1e-8, 1.0, 1e8):
        (p,) = make_params([(6, 9)], dtype=torch.float64)
        advance(hf_optim.Amos([p]), [p], 30, scale=scale)
        results.append(p.detach())
    close(results[0], results[1], rtol=1e-9)
    close(results[2], results[1], rtol=1e-9)


def test_amos_b_never_falls():
    (p,) = make_params([(6, 9)])
    optimizer, last = hf_optim.Amos([p], lr=0.1), torch.zeros(6)
    for t in range(1, 40):
        advance(optimizer, [p], 1, first=t, scale=10.0 ** (t % 5))
        assert (optimizer.state[p]["b"] >= last).all()
        last = optimizer.state[p]["b"].clone()
    assert (last > 0).all()


def test_amos_decay_shrinks_weights_without_gradient():
    p = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))  # a port with the wrong sign reaches 11.5
    optimizer = hf_optim.Amos([p], lr=0.1, weight_decay=1.0)
    for _ in range(50):
        one_step(optimizer, 0.0)
    close(p, 0.9**50, rtol=1e-9)


def test_amos_gives_weights_their_size():
    (p,) = make_params([(40, 50)])
    optimizer = hf_optim.Amos([p], lr=0.1, eta=0.1, c_coef=0.0, d_coef=0.0)
    for _ in range(800):
        one_step(optimizer, torch.randn(40, 50))
    assert rms(p).item() == pytest.approx(0.1, rel=0.08)


def test_amos_statistics_follow_the_output_axis():
    shapes = {(6, 9): (6,), (4, 3, 2, 2): (4,), (7,): (), (): ()}
    for axis in (0, 1):
        for shape, rows in shapes.items():
            p = zeros(*shape)
            optimizer = hf_optim.Amos([p], output_axis=axis)
            one_step(optimizer, 1.0)
            wanted = (shape[axis],) if len(shape) > 1 else rows
            assert [tuple(optimizer.state[p][k].shape) for k in ("v", "b")] == [wanted] * 2
            assert keys(optimizer) == [{"v", "b"}]


class Block(torch.nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.wte = torch.nn.Embedding(11, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.fc = torch.nn.Linear(8, 6)
        self.proj = Conv1D(5, 6)  # weight (in, out) = (6, 5)
        self.conv = torch.nn.Conv1d(2, 3, 4)


def amos_etas(**options):
    model = Block()
    optimizer = hf_optim.create("amos", model, **options)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: (g["eta"], g["output_axis"]) for g in optimizer.param_groups for p in g["params"]}
    assert set(found) == set(names.values())
    return found


def test_amos_reads_eta_from_the_kind_of_module():
    root = pytest.approx
    assert amos_etas() == {
        "wte.weight": (root((2 / 8) ** 0.5), 0),
        "norm.weight": (1.0, 0),
        "norm.bias": (None, 0),
        "fc.weight": (None, 0),
        "fc.bias": (None, 0),
        "proj.weight": (None, 1),
        "proj.bias": (None, 0),
        "conv.weight": (None, 0),
        "conv.bias": (None, 0),
    }


def test_amos_eta_of_other_tensors_is_read_from_the_shape():
    xi, sizes = 0.1, {(6, 9): 9**-0.5, (4, 3, 2, 2): 12**-0.5, (7,): 0.5, (): 0.5}
    for shape, eta in sizes.items():
        close(one_step(hf_optim.Amos([zeros(*shape)], lr=xi), 3.0), -xi * eta)
    close(one_step(hf_optim.Amos([zeros(6, 9)], lr=xi, output_axis=1), 3.0), -xi * 6**-0.5)


def test_amos_etas_by_name_and_eta_for_all():
    found = amos_etas(etas=r"^proj\.weight:0.3;norm:0.7;bias:0.2")
    assert found["proj.weight"] == (0.3, 1)
    assert found["norm.weight"] == found["norm.bias"] == (0.7, 0)
    assert found["fc.bias"] == (0.2, 0)
    assert found["wte.weight"] == (pytest.approx(0.5), 0)
    assert {eta for eta, _ in amos_etas(eta=0.4).values()} == {0.4}
    assert amos_etas(eta=0.4, etas="fc:0.1")["fc.weight"] == (0.1, 0)


def test_amos_etas_need_names_and_numbers():
    with pytest.raises(ValueError, match="names of the parameters"):
        hf_optim.Amos([zeros(3)], etas="norm:1.0")
    for wrong in ("norm", "norm:", ":0.5", "norm:big", "norm:-1", "norm:0", "norm:nan", "(:1"):
        with pytest.raises(ValueError, match="`etas?` must be .*, got"):
            hf_optim.create("amos", Block(), etas=wrong)


def test_amos_etas_that_no_parameter_has_in_its_name_are_refused():
    with pytest.raises(ValueError, match="`etas`: no trainable parameter is named 'nrom'"):
        hf_optim.create("amos", Block(), etas="bias:0.2;nrom:0.7")


# ---- SMMF ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("matricize", ["rows", "square"])
def test_smmf_first_step(matricize):
    g = torch.randn(6, 9)
    g[2], g[0, 0] = 0, 0
    moved = one_step(hf_optim.SMMF([zeros(6, 9)], lr=1.0, matricize=matricize), g)
    close(moved, -0.1 * g.sign().double(), rtol=1e-5)  # lr (1 - beta1) g / |g|
    assert torch.equal(moved == 0, g == 0)


def test_smmf_factors_keep_row_and_column_sums():
    x, rank1 = torch.rand(6, 9).double(), torch.outer(torch.rand(6), torch.rand(9)).double()
    of_x, of_rank1, of_zero = (torch.outer(row, col) for row, col in factors(x, rank1, torch.zeros(6, 9)))
    close(of_x.sum(0), x.sum(0), rtol=1e-12)
    close(of_x.sum(1), x.sum(1), rtol=1e-12)
    close(of_rank1, rank1, rtol=1e-6)
    assert not of_zero.any()


def test_signs_survive_packing():
    for m, n in [(1, 1), (3, 7), (3, 8), (2, 9), (5, 16), (4, 17), (0, 5), (5, 0)]:
        x = torch.randn(m, n)
        packed = pack_signs(x)
        assert packed.dtype == torch.uint8 and packed.shape == (m, -(-n // 8))
        assert torch.equal(with_signs(x.abs(), packed), torch.where(x > 0, x.abs(), -x.abs()))


def test_smmf_stores_an_eighth_of_a_byte_per_weight():
    p = zeros(4096, 4096)
    optimizer = hf_optim.SMMF([p], lr=0.0)
    one_step(optimizer, 0.0)  # nothing but state
    held = sum(x.numel() * x.element_size() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
    assert held / p.numel() == hf_optim.info("smmf").bytes_per_parameter == pytest.approx(0.129, abs=5e-4)


def test_smmf_rows_that_never_get_a_gradient_stay():
    # a bit cannot say "zero": in the square reshape, which mixes rows, they drift as fast as the others move
    drift = {}
    for matricize in ("rows", "square"):
        (p,) = make_params([(100, 64)])
        old, optimizer = p.detach().clone(), hf_optim.SMMF([p], matricize=matricize)
        for _ in range(200):
            g = torch.randn(100, 64)
            g[::2] = 0
            one_step(optimizer, g)
        drift[matricize] = (p - old)[::2].abs().max().item()
        assert ((p - old)[1::2] != 0).all()
    assert drift["rows"] == 0
    assert drift["square"] > 1e-3


def test_smmf_small_fp16_gradients_do_not_explode():
    p = zeros(16, 16, dtype=torch.float16)  # the square of 1e-4 is 0 in fp16, and m / eps moved a weight by 10
    optimizer = hf_optim.SMMF([p], lr=0.01)
    for _ in range(20):
        moved = one_step(optimizer, (1e-4 * torch.randn(16, 16)).half())
        assert moved.abs().max() < 0.05
    assert moved.abs().max() > 1e-3


def test_smmf_of_a_prime_number_of_weights():
    p = zeros(1031)
    optimizer = hf_optim.SMMF([p], matricize="square")
    for _ in range(3):
        moved = one_step(optimizer, torch.randn(1031))
    assert optimizer.state[p]["signs"].shape == (1031, 1)  # hardly smaller than Adam: (1031, 1) is all there is
    assert moved.isfinite().all() and moved.any()


# ---- nSGDA ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1.0, 1e15])
def test_nsgda_moves_by_lr(scale):
    optimizer = hf_optim.NSGDA([zeros(20, 30), zeros(7), zeros()], lr=0.5, eps=1e-30)
    for t in range(5):
        for moved in one_step(optimizer, *[scale * torch.randn(p.shape) for p in optimizer.parameters()]):
            assert moved.norm().item() == pytest.approx(0.5, rel=1e-4 if t else 1e-6)


def test_nsgda_does_not_see_the_scale_of_the_gradient():
    results = []
    for scale in (1e-5, 1.0, 1e5):
        (p,) = make_params([(6, 9)], dtype=torch.float64)
        advance(hf_optim.NSGDA([p], eps=1e-30), [p], 30, scale=scale)
        results.append(p.detach())
    close(results[0], results[1], rtol=1e-9)
    close(results[2], results[1], rtol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_nsgda_first_step_is_the_normalised_gradient(momentum):
    g = torch.randn(6, 9)
    close(one_step(hf_optim.NSGDA([zeros(6, 9)], lr=1.0, momentum=momentum), g), -(g / g.norm()).double(), rtol=1e-5)


def test_nsgda_of_the_model_moves_all_tensors_by_lr_together():
    params = [zeros(20, 30), zeros(7), zeros(0), zeros()]
    optimizer = hf_optim.NSGDA(params[:2], lr=0.5, scope="model")
    optimizer.add_param_group({"params": params[2:]})
    for _ in range(5):
        moved = one_step(optimizer, torch.randn(20, 30), 100 * torch.randn(7), torch.randn(0), torch.randn(()))
        norms = [x.norm().item() for x in moved]
        assert math.hypot(*norms) == pytest.approx(0.5, rel=1e-4)
    assert norms[1] > norms[0]


def test_nsgda_of_the_model_refuses_gradient_release():
    with pytest.raises(ValueError, match="needs all gradients at once"):
        hf_optim.NSGDA([zeros(3)], scope="model").release_gradients()


def test_nsgda_rms_moves_every_weight_by_about_lr():
    for scope in ("tensor", "model"):
        optimizer = hf_optim.NSGDA([zeros(20, 30), zeros(7)], lr=0.01, scale="rms", scope=scope)
        moved = one_step(optimizer, torch.randn(20, 30), torch.randn(7))
        parts = moved if scope == "tensor" else [torch.cat([x.flatten() for x in moved])]
        assert all(rms(x).item() == pytest.approx(0.01, rel=1e-5) for x in parts)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_nsgda_without_gradient(scope):
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = hf_optim.NSGDA([p], lr=0.03, weight_decay=0.01, scope=scope)
    for _ in range(200):  # a decay added to the gradient would become the direction, at full speed: 0 in 105 steps
        one_step(optimizer, 0.0)
    close(p, (1 - 3e-4) ** 200, rtol=1e-5)


def test_nsgda_norm_of_large_fp16_gradients():
    p = zeros(1000, dtype=torch.float16)  # in fp16 the norm of these is inf, and the update 0
    assert one_step(hf_optim.NSGDA([p], lr=1.0), 3e4).float().norm().item() == pytest.approx(1.0, rel=1e-3)


# ---- AdaLo ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["adversarial", "compliant", "loss"])
@pytest.mark.parametrize("loss", [0.0, 2.3, 1e3, 1e8])
def test_adalo_average_and_step_size(mode, loss):
    kappa, beta2 = 3.0, 0.99
    optimizer = hf_optim.AdaLo([zeros(3)], mode=mode, kappa=kappa, beta2=beta2)
    for t in range(1, 60):
        one_step(optimizer, 1.0, loss=loss)
        e = (1 - beta2**t) * (loss / kappa if mode == "loss" else 1 / (2 + loss))
        eta = {"adversarial": e / kappa, "compliant": (1 - e) / kappa, "loss": e}[mode]
        assert optimizer.param_groups[0]["e"].item() == pytest.approx(e, rel=3e-6)  # 1.4e-3 by tanh, at 1e5
        assert optimizer.effective_lr() == pytest.approx(max(eta, 1e-8), rel=3e-6)


def test_adalo_first_step():
    p, g = make_params([(6, 9)], dtype=torch.float64)[0], torch.randn(6, 9).double()
    old, eta = p.detach().clone(), 1e-3 / ((2 + 2.3) * 3)
    one_step(hf_optim.AdaLo([p], weight_decay=0.1), g, loss=2.3)
    close(p - old, -eta * (0.1 * g + 0.1 * old), rtol=1e-5)


@pytest.mark.parametrize("mode", ["adversarial", "compliant", "loss"])
@pytest.mark.parametrize("wrong", [-0.5, -5.0, -math.inf, math.inf, math.nan])
def test_adalo_survives_any_loss(mode, wrong):
    p, q = make_params([(6, 9)])[0], make_params([(6, 9)])[0]
    a, b = hf_optim.AdaLo([p], mode=mode, beta2=0.5), hf_optim.AdaLo([q], mode=mode, beta2=0.5)
    advance(a, [p], 3), advance(b, [q], 3)
    before = a.param_groups[0]["e"].item()
    one_step(a, 1.0, loss=wrong)
    one_step(b, 1.0, loss=0.0)
    if math.isfinite(wrong):  # counts as 0
        assert torch.equal(p, q)
    else:
        assert a.param_groups[0]["e"].item() == before
    assert p.isfinite().all()
    advance(a, [p], 3)
    assert p.isfinite().all() and a.param_groups[0]["e"].isfinite()


def test_adalo_without_a_loss_is_an_error_that_changes_nothing():
    (p,) = make_params([(6, 9)])
    optimizer = hf_optim.AdaLo([p])
    advance(optimizer, [p], 3)
    weights, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    for way in ("step(loss=loss)", "report_loss(loss)", "LossAwareTrainer", "hf-optim run"):
        assert way in str(error.value)
    assert torch.equal(p, weights) and same(optimizer.state_dict(), state)
    with pytest.raises(RuntimeError):  # a loss serves one step
        one_step(optimizer, 1.0, loss=1.0)
        optimizer.step()


def same(a, b):
    """Whether two state dicts are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, (list, tuple)) else a == b


def test_adalo_takes_the_loss_in_four_ways():
    def fit(step):
        (p,) = make_params([(6, 9)])
        optimizer = hf_optim.AdaLo([p], beta2=0.5)
        for t in range(1, 5):
            optimizer.zero_grad()
            step(optimizer, lambda p=p, t=t: (p * p).mean() * t)
        return p.detach()

    def by_closure(optimizer, loss_of):
        def closure():
            loss = loss_of()
            loss.backward()
            return loss

        assert optimizer.step(closure).requires_grad

    def by_argument(optimizer, loss_of):
        loss = loss_of()
        loss.backward()
        optimizer.step(loss=loss)

    def by_report(optimizer, loss_of):
        loss = loss_of()
        loss.backward()
        optimizer.report_loss(1e3)  # a second report replaces the first
        optimizer.report_loss(loss.item())
        optimizer.step()

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def by_scaler(optimizer, loss_of):
        optimizer.step(loss_of, scaler=scaler)
        scaler.update()

    results = [fit(way) for way in (by_closure, by_argument, by_report, by_scaler)]
    assert results[0].sub(make_params([(6, 9)])[0]).abs().min() > 0
    for result in results[1:]:
        close(result, results[0].double(), rtol=1e-6)


def test_adalo_a_step_that_the_scaler_skips_leaves_no_trace():
    (p,) = make_params([(6, 9)])
    optimizer, scaler = hf_optim.AdaLo([p], beta2=0.5), torch.amp.GradScaler("cpu", init_scale=8.0)
    advance(optimizer, [p], 3)
    weights, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step(lambda: (p * math.inf).sum(), scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert torch.equal(p, weights) and same(optimizer.state_dict(), state)
    with pytest.raises(RuntimeError):  # nor does its loss serve the next step
        optimizer.step()


def test_adalo_does_not_read_lr_unless_it_follows_the_schedule():
    results = []
    for lr in (1e-3, 100.0):
        (p,) = make_params([(6, 9)])
        advance(hf_optim.AdaLo([p], lr=lr), [p], 5)
        results.append(p.detach())
    assert torch.equal(*results)


def test_adalo_follows_a_scheduler():
    (p,) = make_params([(6, 9)])
    optimizer = hf_optim.AdaLo([p], lr=0.3, mode="loss", kappa=1.0, beta2=0.0, follow_schedule=True)
    schedule = LambdaLR(optimizer, lambda t: 0.5 + 0.1 * t)
    for t in range(4):
        one_step(optimizer, 1.0, loss=2.0)
        schedule.step()
        assert optimizer.effective_lr() == pytest.approx(2.0 * (0.5 + 0.1 * t), rel=1e-6)


@pytest.mark.parametrize("schedule", [None, LambdaLR])
def test_adalo_tells_that_it_follows_no_scheduler(schedule, caplog):
    (p,) = make_params([(6, 9)])
    optimizer = hf_optim.AdaLo([p], follow_schedule=True)
    _ = schedule and schedule(optimizer, lambda t: 1.0)
    one_step(optimizer, 1.0, loss=2.0)
    assert ("follows no scheduler" in caplog.text) == (schedule is None)


def test_adalo_has_one_average_for_all_groups():
    params = make_params([(6, 9), (4,), (3,)])
    optimizer = hf_optim.AdaLo([{"params": params[0]}, {"params": params[1], "weight_decay": 0.1}])
    advance(optimizer, params[:2], 5)
    optimizer.add_param_group({"params": params[2]})
    advance(optimizer, params, 5, first=6)
    assert len({group["e"].item() for group in optimizer.param_groups}) == 1
    alone = hf_optim.AdaLo(make_params([(6, 9)]))
    advance(alone, list(alone.parameters()), 10)
    assert alone.param_groups[0]["e"].item() == optimizer.param_groups[2]["e"].item()


def test_adalo_average_of_bf16_losses_does_not_stall():
    optimizer = hf_optim.AdaLo([zeros(3, dtype=torch.bfloat16)])
    for _ in range(2000):  # a bf16 average stops at 0.0625
        one_step(optimizer, 1.0, loss=torch.tensor(2.3, dtype=torch.bfloat16))
    wanted = (1 - 0.999**2000) / (2 + float(torch.tensor(2.3).bfloat16()))
    assert optimizer.param_groups[0]["e"].item() == pytest.approx(wanted, rel=1e-4)


# ---- denominator=atan2 ---------------------------------------------------------------------------------------------
def test_atan2_first_step():
    g = torch.randn(6, 9)
    for scale in (1e-12, 1.0, 1e12):
        p = zeros(6, 9)
        moved = one_step(hf_optim.AdamW([p], lr=1.0, denominator="atan2", atan2_a=2.0, atan2_b=3.0), scale * g)
        close(moved, -2 * math.atan(1 / 3) * g.sign().double(), rtol=1e-5)


def test_atan2_does_not_see_the_scale_of_the_gradient():
    results = []
    for scale in (1e-12, 1.0, 1e8):
        (p,) = make_params([(6, 9)], dtype=torch.float64)
        advance(hf_optim.AdamW([p], denominator="atan2"), [p], 30, scale=scale)
        results.append(p.detach())
    close(results[0], results[1], rtol=1e-12)
    close(results[2], results[1], rtol=1e-12)


@pytest.mark.parametrize("rule, beta1", [("adamw", 0.5), ("smmf", None)])
def test_atan2_is_bounded_and_safe_at_zero(rule, beta1):
    p = zeros(6, 9)
    optimizer, largest = hf_optim.create(rule, [p], lr=1.0, beta1=beta1, denominator="atan2"), 0.0
    for t in range(15):
        g = torch.randn(6, 9) * 10.0 ** (t - 7)  # growing gradients: the ratio goes to 2
        g[:, 0] = 0
        moved = one_step(optimizer, g)
        assert not moved[:, 0].any() and moved.isfinite().all()
        largest = max(largest, moved.abs().max().item())
    assert 1.3 < largest < 1.27 * math.pi / 2


def test_atan2_of_large_b_is_adam():
    gap = {}
    for b in (10.0, 100.0):
        ours, adam = make_params([(6, 9)], dtype=torch.float64), make_params([(6, 9)], dtype=torch.float64)
        advance(hf_optim.AdamW(ours, denominator="atan2", atan2_a=b, atan2_b=b), ours, 20)
        advance(hf_optim.AdamW(adam, eps=0.0), adam, 20)
        gap[b] = (ours[0] - adam[0]).abs().max().item()
    assert gap[100.0] < gap[10.0] / 50  # the error falls as 1 / b^2


# ---- cautious ------------------------------------------------------------------------------------------------------
def test_cautious_never_steps_against_the_gradient(name):
    p, q = zeros(12, 9), zeros(12, 9)
    options = getattr(oracles.load(name), "NEEDS", {}).get("cautious", {}) | {"lr": 1.0}
    options |= {
        flag: False for flag in ("trust_ratio", "lookahead") if flag in hf_optim.info(name).preset
    }  # act after it
    a, b = [hf_optim.create(name, [x], cautious=on, **options) for x, on in ((p, True), (q, False))]
    masked = 0
    for _ in range(15):
        p.data.zero_(), q.data.zero_()  # the same state of both: moments are not masked
        g = torch.randn(12, 9)
        loss = {"loss": 2.0} if a.needs_loss else {}
        moved, plain = one_step(a, g, **loss), one_step(b, g, **loss)
        aligned = plain * g < 0
        assert (moved * g <= 0).all()
        close(moved, (plain * aligned / aligned.double().mean()).double(), rtol=1e-4)
        masked += (~aligned).sum().item()
    assert masked > (50 if name == "nadamw" else 100)  # whose look ahead follows the gradient more closely


def test_cautious_first_step_is_the_plain_one():
    for name in ("adamw", "smmf", "nsgda", "adalo"):
        p, q = zeros(6, 9), zeros(6, 9)
        g, a, b = torch.randn(6, 9), hf_optim.create(name, [p], cautious=True), hf_optim.create(name, [q])
        loss = {"loss": 2.0} if a.needs_loss else {}
        assert torch.equal(one_step(a, g, **loss), one_step(b, g, **loss))


def test_cautious_does_not_blow_up_the_touched_rows_of_an_embedding():
    # counting untouched rows as misaligned multiplies the step by 50 here
    p, g = zeros(100, 8), torch.zeros(100, 8)
    g[[3, 50]] = torch.randn(2, 8)
    moved = one_step(hf_optim.AdamW([p], lr=1.0, cautious=True), g)
    close(moved, -g.sign().double(), rtol=1e-5)


def test_cautious_stays_where_everything_is_misaligned():
    p = zeros(6, 9)
    optimizer = hf_optim.AdamW([p], lr=1.0, cautious=True)
    g = torch.randn(6, 9)
    assert one_step(optimizer, g).all()
    assert not one_step(optimizer, -0.01 * g).any()  # the average still has the sign of g


def test_cautious_floor_bounds_the_factor():
    g = torch.ones(1000)
    for floor, factor in ((1e-3, 500.0), (0.1, 10.0)):
        p, q = zeros(1000), zeros(1000)
        a, b = hf_optim.AdamW([p], cautious=True, cautious_floor=floor), hf_optim.AdamW([q])
        one_step(a, g), one_step(b, g)
        turned = -0.01 * g
        turned[:2] = 0.01  # two of a thousand agree
        moved, plain = one_step(a, turned), one_step(b, turned)
        close(moved[:2], factor * plain[:2].double(), rtol=1e-4)
        assert not moved[2:].any()


def test_cautious_compares_signs_not_products():
    p = zeros(2)  # 1e-30 times an update of 1e-22 is 0
    assert one_step(hf_optim.AdamW([p], lr=1.0, cautious=True), torch.tensor([1e-30, 1.0])).all()


@pytest.mark.parametrize("rule", ["adamw", "adafactor_corrected", "sm3", "amos", "smmf", "nsgda", "adalo"])
def test_cautious_is_refused_where_the_update_has_the_sign_of_the_gradient(rule):
    without = {"adamw": {"beta1": 0.0}, "smmf": {"beta1": None}, "nsgda": {"momentum": 0.0}, "adalo": {"beta1": 0.0}}
    with pytest.raises(ValueError, match="`cautious=True` cannot act on"):
        hf_optim.create(rule, [zeros(3)], cautious=True, **without.get(rule, {}))


# ---- decay=cautious ------------------------------------------------------------------------------------------------
def test_cautious_decay_by_hand():
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64))
    g = torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64)
    one_step(hf_optim.AdamW([p], lr=0.1, weight_decay=0.5, decay="cautious"), g)
    close(p, torch.tensor([1.8, -1.1, -0.1]), rtol=1e-7)


def test_cautious_decay_limits():
    start, results = torch.randn(6, 9), {}
    for kind in ("cautious", "decoupled", "none"):
        for sign in (1, -1):
            p = torch.nn.Parameter(start.clone())
            options = {"weight_decay": 0.0} if kind == "none" else {"weight_decay": 0.1, "decay": kind}
            optimizer = hf_optim.AdamW([p], lr=1e-3, **options)
            for _ in range(5):
                one_step(optimizer, sign * start)
            results[kind, sign] = p.detach()
    assert torch.equal(results["cautious", 1], results["decoupled", 1])  # every step goes towards 0
    assert torch.equal(results["cautious", -1], results["none", -1])  # every step goes away from 0


def test_cautious_decay_compares_signs_not_products():
    # 1e-30 * -1e-20 is -0, and -0 >= 0
    h = View({"weight_decay": 1.0})
    for u, wanted in ((-1e-20, 0.0), (1e-20, 1.0), (0.0, 1.0)):
        p = torch.tensor([1e-30, 1.0])
        context = View({"u": torch.full((2,), u), "p": p, "h": h})
        assert torch.equal(CautiousDecay.apply(p, context), wanted * p)


def test_cautious_decay_reads_the_update_before_the_cautious_mask():
    # after the mask u = 0 there, and the decay would act exactly where the update is held back
    p = torch.nn.Parameter(torch.full((4,), -1.0))
    optimizer = hf_optim.AdamW([p], lr=0.1, cautious=True, decay="cautious", weight_decay=0.5)
    one_step(optimizer, 1.0)
    moved = one_step(optimizer, -0.01)  # u > 0 > g: no update; u p < 0: no decay
    assert not moved.any()


# ---- centralize ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(6, 9), (4, 3, 2, 2)])
def test_centralize_keeps_the_mean_of_every_row(shape):
    (p,) = make_params([shape], dtype=torch.float64)
    before = p.detach().flatten(1).mean(1)
    optimizer = hf_optim.NSGDA([p], lr=1.0, centralize=True)
    for _ in range(5):
        assert one_step(optimizer, torch.randn(shape).double()).norm() > 0.5
    close(p.detach().flatten(1).mean(1), before, rtol=1e-12, atol=1e-12)


def test_centralize_is_idempotent(name):
    p, q = make_params([(6, 9)])[0], make_params([(6, 9)])[0]
    a, b = hf_optim.create(name, [p], centralize=True), hf_optim.create(name, [q], centralize=True)
    for _ in range(5):
        g, loss = torch.randn(6, 9), {"loss": 2.0} if a.needs_loss else {}
        one_step(a, g, **loss), one_step(b, g - g.mean(1, keepdim=True), **loss)
    close(p, q.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 1), (4, 1, 1), (7,), ()])
def test_centralize_leaves_units_of_one_weight_and_vectors_alone(name, shape):
    # the mean of a single weight's gradient is that gradient: such a layer would never train
    p, q = make_params([shape])[0], make_params([shape])[0]
    for x, options in ((p, {"centralize": True}), (q, {})):
        optimizer = hf_optim.create(name, [x], **options)
        advance(optimizer, [x], 3)
    assert torch.equal(p, q)
    assert (p != make_params([shape])[0]).all()


# ---- lookahead -----------------------------------------------------------------------------------------------------
def plus_one(**options):
    """Seven steps of an optimizer that adds 1 at every step, with lookahead."""
    p = torch.nn.Parameter(torch.tensor(0.0))
    optimizer = hf_optim.NSGDA([p], lr=1.0, momentum=0.0, lookahead=True, **options)
    return [round((one_step(optimizer, -1.0), p.item())[1], 4) for _ in range(7)]


def test_lookahead_by_hand():
    # slow weights copied at the first sync instead of before the first step give 1, 2, 3, 3, 4, 4
    assert plus_one(lookahead_k=2, lookahead_alpha=0.5) == [1, 1, 2, 2, 3, 3, 4]
    assert plus_one(lookahead_k=1, lookahead_alpha=0.25) == [0.25 * t for t in range(1, 8)]
    assert plus_one(lookahead_k=3, lookahead_alpha=1.0) == [1, 2, 3, 4, 5, 6, 7]
    assert plus_one() == [1, 2, 3, 4, 2.5, 3.5, 4.5]


def test_lookahead_leaves_the_moments_alone():
    p, q = make_params([(6, 9)])[0], make_params([(6, 9)])[0]
    a, b = hf_optim.AdamW([p], lookahead=True, lookahead_k=2), hf_optim.AdamW([q])
    advance(a, [p], 6), advance(b, [q], 6)
    assert torch.equal(a.state[p]["m"], b.state[q]["m"]) and not torch.equal(p, q)


def test_lookahead_slow_weights_of_bf16_weights_are_fp32():
    p = torch.nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = hf_optim.AdamW([p], lr=1e-2, lookahead=True, lookahead_k=1, lookahead_alpha=0.1)
    for _ in range(20):  # a step of 1e-2 is seen by bf16, the tenth of it that the slow weights go is not
        one_step(optimizer, 1.0)
    assert optimizer.state[p]["lookahead_slow"].dtype == torch.float32
    assert (optimizer.state[p]["lookahead_slow"] < 0.99).all()


def test_lookahead_of_a_parameter_without_gradient_does_not_move():
    p, q = make_params([(3,), (3,)])
    optimizer = hf_optim.AdamW([p, q], lookahead=True, lookahead_k=2)
    advance(optimizer, [p, q], 1)
    q.grad, held = None, q.detach().clone()
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(q, held) and optimizer.state[q]["step"] == 1 and optimizer.state[p]["step"] == 4
