# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""bf16 weights and state: what is lost, what is kept, and where the random bits come from."""

import itertools

import pytest
import torch
from conftest import advance, fill_grads, loss_at, make_params
from engine import BF16, build, everything, flags_on, frozen

import hf_optim
from hf_optim.core import precision


BF16_MAX = torch.finfo(BF16).max
FP32_MAX = torch.finfo(torch.float32).max


def rounded(value, noise):
    buffer = torch.empty(value.shape, dtype=BF16)
    precision.write(buffer, value, noise)
    return buffer


def steady(name, options, steps, dtype=BF16, start=1.0, gradient=1.0, shape=(32, 32)):
    """Weights that are all equal under a gradient that never changes."""
    p = torch.nn.Parameter(torch.full(shape, start, dtype=dtype))
    optimizer = hf_optim.create(name, [p], **options)
    p.grad = torch.full(shape, gradient, dtype=dtype)
    for _ in range(steps):
        optimizer.step(loss=loss_at(1) if optimizer.needs_loss else None)
    return p.detach(), optimizer.state[p]


# ---- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_goes_up_as_often_as_it_should(share, sign):
    n, low, ulp = 200_000, 1.0, 2.0**-7
    value = torch.full((n,), sign * (low + share * ulp))
    result = rounded(value, precision.noise_bits(value, precision.salt(0, 1, 0), 0, 0)).float()
    assert set(result.tolist()) <= {sign * low, sign * (low + ulp)}
    up = (result != sign * low).float().mean().item()
    assert abs(up - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_numbers_that_bf16_has_are_never_changed():
    value = torch.arange(2**16, dtype=torch.int32).sub(2**15).to(torch.int16).view(BF16).float()  # every bf16 there is
    for bits in (0, 1, 0x7FFF, 0xFFFF):
        result = rounded(value, torch.full(value.shape, bits, dtype=torch.int32))
        finite = value.isfinite()
        assert torch.equal(result[finite].view(torch.int16), value[finite].to(BF16).view(torch.int16))
        assert torch.equal(result.isnan(), value.isnan()) and torch.equal(result.isinf(), value.isinf())


def test_nan_and_inf_are_kept_and_nothing_finite_becomes_inf():
    # quiet ones: arithmetic makes no other
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00001, -0x3FFFFF, 0x7FC00000], dtype=torch.int32)
    special = torch.tensor([float("inf"), -float("inf"), FP32_MAX, -FP32_MAX, BF16_MAX * 1.001, 1e-45, -1e-45])
    value = torch.cat([patterns.view(torch.float32), special])
    for bits in (0, 1, 0x8000, 0xFFFF):
        result = rounded(value, torch.full(value.shape, bits, dtype=torch.int32)).float()
        assert result[:5].isnan().all()
        assert result[5:7].tolist() == [float("inf"), -float("inf")]
        assert result[7:10].tolist() == [BF16_MAX, -BF16_MAX, BF16_MAX]
        assert result[10:].isfinite().all()


@pytest.mark.parametrize("precision_", ["stochastic", "kahan"])
def test_weights_at_the_end_of_the_range(precision_):
    p, state = steady("adamw", {"lr": 2e35, "precision": precision_}, 4, start=BF16_MAX, gradient=-1.0)
    assert (p == BF16_MAX).all()
    # what is beyond it is lost: "left over" and added back it would stop the weight from coming back
    assert precision_ == "stochastic" or not state["residual"].any()


def test_noise_is_even_and_independent():
    n = 200_000
    streams = {
        (salt, channel): precision.noise_bits(torch.empty(n), salt, 0, channel)
        for salt in (
            precision.salt(0, 1, 0),
            precision.salt(0, 2, 0),
            precision.salt(0, 1, 1),
            precision.salt(1, 1, 0),
        )
        for channel in (0, 1)
    }
    for noise in streams.values():
        assert noise.min() >= 0 and noise.max() <= 0xFFFF
        for bit in range(16):  # each bit is a fair coin: 5 sigma of 200,000 tosses
            assert abs(((noise >> bit) & 1).float().mean().item() - 0.5) < 5 * 0.5 / n**0.5
        cells = torch.bincount(noise >> 8, minlength=256).float()
        assert ((cells - n / 256).square() / (n / 256)).sum() < 255 + 6 * (2 * 255) ** 0.5  # chi square
    centred = {key: noise.float() / 65536 - 0.5 for key, noise in streams.items()}
    for a, b in itertools.combinations(centred.values(), 2):
        assert abs((a * b).mean().item() * 12) < 5 / n**0.5
    for x in centred.values():
        for lag in (1, 2, 64, 4096):  # neighbours in a row and in a column
            assert abs((x[lag:] * x[:-lag]).mean().item() * 12) < 5 / (n - lag) ** 0.5


def test_noise_of_a_part_is_the_part_of_the_noise():
    salt = precision.salt(3, 7, 2)
    whole = precision.noise_bits(torch.empty(12, 5), salt, 0, 1)
    assert torch.equal(precision.noise_bits(torch.empty(4, 5), salt, 15, 1), whole[3:7])
    assert torch.equal(precision.noise_bits(torch.empty(60), salt, 0, 1), whole.flatten())
    assert torch.equal(precision.noise_bits(torch.empty(0, 5), salt, 60, 1), whole[12:])


def test_noise_goes_on_beyond_two_to_the_31():
    start = 2**31 - 3  # offsets wrap around in int32, as the positions of a single huge tensor would
    low, high = precision.noise_bits(torch.empty(6), 5, precision.int32(start), 0), 0
    assert len(set(low.tolist())) > 1 and low.min() >= high
    parts = [precision.noise_bits(torch.empty(1), 5, precision.int32(start + i), 0) for i in range(6)]
    assert torch.equal(low, torch.cat(parts))


def test_salts_differ_for_every_seed_step_and_parameter():
    salts = {precision.salt(seed, t, i) for seed in range(8) for t in range(32) for i in range(32)}
    assert len(salts) > 8 * 32 * 32 - 20  # 32-bit numbers: fewer than 20 collisions among 8192
    assert all(-(2**31) <= s < 2**31 for s in salts)
    assert precision.salt(10**30, 10**12, 10**6) == precision.salt(10**30, 10**12, 10**6)


def test_rounding_is_the_same_when_compiled():
    def both(value, salt, offset):
        weight, residual, state = torch.zeros(4096, dtype=BF16), torch.zeros(4096, dtype=BF16), torch.zeros(4096)
        state = state.to(BF16)
        precision.write_kahan(weight, residual, value)
        precision.write(state, value, precision.noise_bits(value, salt, offset, 3))
        return weight, residual, state

    value = torch.randn(4096).mul(3)
    value[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), FP32_MAX, 0.0, -0.0])
    salt, offset = (torch.tensor(x, dtype=torch.int32) for x in (precision.salt(1, 2, 3), 77))
    eager, compiled = both(value, salt, offset), torch.compile(both, fullgraph=True)(value, salt, offset)
    for a, b in zip(compiled, eager):
        assert torch.equal(a.isnan(), b.isnan())  # which of the many NaNs it is may differ
        assert frozen(a[1:]) == frozen(b[1:])
    assert compiled[1].count_nonzero() > 4000  # Inductor folds the textbook residual to 0


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_step_is_taken_in_fp32_and_rounded_once(name, dtype):
    optimizer, params = build(name, dtype=dtype, **flags_on(name))
    exact = [torch.nn.Parameter(p.detach().float()) for p in params]
    other = hf_optim.create(name, exact, **flags_on(name))
    fill_grads(params, seed=1)
    for p, q in zip(params, exact):
        q.grad = p.grad.float()
    optimizer.step(loss=1.0)
    other.step(loss=1.0)
    assert frozen([q.to(dtype) for q in exact]) == frozen([p.detach() for p in params])
    buffers = [[s[k] for k in s if k != "step"] for o in (optimizer, other) for s in o.state.values()]
    assert frozen(buffers[: len(params)]) == frozen(buffers[len(params) :])


TINY = {  # steps of about 1e-4, far below half the distance of 2^-8 between 1 and the next smaller bf16 number
    "adalo": {"kappa": 2000.0, "beta2": 0.5},
    "nsgda": {"lr": 1e-4, "scale": "rms"},
    "sm3": {"lr": 1e-4, "beta": 0.9},
    "amos": {"lr": 3e-4, "eta": 1.0},
    "muon": {"lr": 4e-3},
}


@pytest.mark.parametrize("decay", [False, True])
def test_small_updates_add_up_under_kahan_and_on_average_under_stochastic_rounding(name, decay):
    options = TINY.get(name, {"lr": 1e-4})
    # by weight decay alone: no gradient, but an equally small pull on every step
    if decay:
        options = {**options, "weight_decay": 0.125 if name == "muon" else 0.5}  # alike, times lr
        if hf_optim.info(name).preset.get("decay") in ("stable", "cpr"):  # they need gradients, or no decay at all
            options["decay"] = "decoupled"
    gradient = 0.0 if decay else 1.0
    exact, _ = steady(name, options, 300, dtype=torch.float32, gradient=gradient)
    moved = 1.0 - exact.mean().item()
    assert 3e-3 < moved < 0.3
    nearest, _ = steady(name, options, 300, gradient=gradient)
    assert (nearest == 1.0).all()  # each update is rounded away: why the option exists
    kahan, state = steady(name, {**options, "precision": "kahan"}, 300, gradient=gradient)
    assert state["residual"].dtype == BF16 and state["residual"].any()
    value = kahan.float() + state["residual"].float()
    assert (value - exact).abs().max() < 0.03 * moved
    assert (kahan.float() - exact).abs().max() < 2**-8
    noisy, _ = steady(name, {**options, "precision": "stochastic"}, 300, gradient=gradient)
    # a random walk of 300 steps up or down to a neighbour 2^-8 away, averaged over 1024 weights
    sd = 2**-8 * (moved / 2**-8) ** 0.5 / 32
    assert abs(noisy.float().mean() - exact.mean()) < 5 * sd + 0.01 * moved
    assert noisy.unique().numel() > 2


def test_kahan_follows_a_thousand_steps_of_fp32():
    options = {"lr": 1e-4, "weight_decay": 0.1}
    exact, _ = steady("adamw", options, 1000, dtype=torch.float32, shape=(4,))
    kahan, state = steady("adamw", {**options, "precision": "kahan"}, 1000, shape=(4,))
    assert 0.85 < exact.max() < 0.95
    # the residual is bf16 itself, so some of what is lost is lost for good: 1 % of the way
    assert torch.allclose(kahan.float() + state["residual"].float(), exact, rtol=0, atol=2e-3)


def noisy(name, params, seed=0, steps=2, **options):
    options = {"precision": "stochastic", "state_dtype": "bfloat16", "seed": seed, **options}
    optimizer = hf_optim.create(name, params, **options)
    advance(optimizer, [p for group in optimizer.param_groups for p in group["params"]], steps)
    return optimizer


def test_noise_depends_on_seed_step_and_position_only(name):
    def run(seed=0, extra=False, manual=0):
        params = make_params([(16, 16), (40,)], BF16) + (make_params([(7,)], BF16) if extra else [])
        torch.manual_seed(manual)
        alone = {"scope": "tensor"} if "scope" in hf_optim.info(name).options else {}
        optimizer = noisy(name, params, seed=seed, **alone)
        return frozen([[p, optimizer.state[p]] for p in params[:2]])

    assert run() == run(manual=5) == run(extra=True)
    assert run() != run(seed=1)


def test_parameters_steps_and_elements_get_noise_of_their_own(name):
    same = torch.full((64,), 1.0 + 2**-9 + 2**-10, dtype=torch.float32)
    results = []
    for index, t in ((0, 1), (1, 1), (0, 2)):
        noise = precision.noise_bits(same, precision.salt(0, t, index), 0, 0)
        results.append(tuple(rounded(same, noise).tolist()))
    assert len(set(results)) == 3
    # and the engine hands them over: equal weights with equal gradients part
    params = [torch.nn.Parameter(torch.full((64,), 1.0, dtype=BF16)) for _ in range(2)]
    optimizer = hf_optim.create(name, params, precision="stochastic", **TINY.get(name, {"lr": 1e-4}))
    for _ in range(20):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=loss_at(1))
    assert not torch.equal(*params) and params[0].unique().numel() > 1


def test_a_parameter_without_gradient_does_not_shift_the_noise_of_the_next(name):
    runs = []
    for missing in (False, True):
        optimizer, params = build(name, [(3,), (64,)], dtype=BF16, precision="stochastic", lr=0.1)
        fill_grads(params, seed=1)
        if missing:
            params[0].grad = None
        optimizer.step(loss=1.0)
        runs.append(frozen(params[1]))
    assert runs[0] == runs[1]


def test_strides_do_not_change_the_noise(name):
    (plain,) = make_params([(3, 4, 2, 2)], BF16)
    other = torch.nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    runs = []
    for p in (plain, other):
        optimizer = hf_optim.create(name, [p], precision="stochastic")
        optimizer.step(loss=1.0)
        for t in (1, 2):
            fill_grads([p], seed=t)
            p.grad = torch.empty_like(p).copy_(p.grad)
            optimizer.step(loss=1.0)
        runs.append(p.detach().contiguous())
    # reductions over other strides may differ in the last bit of fp32, and tip a weight to its other neighbour
    assert (runs[0] != runs[1]).float().mean() < (0.001 if hf_optim.info(name).cls.elementwise else 0.05)


@pytest.mark.parametrize("wanted", ["stochastic", "kahan"])
def test_fp16_weights_are_refused(name, wanted):
    optimizer, params = build(name, [(3,)], dtype=torch.float16, precision=wanted)
    fill_grads(params, seed=1)
    before = frozen(params)
    with pytest.raises(ValueError, match=f"`precision={wanted}` needs bfloat16 weights, got float16"):
        optimizer.step(loss=1.0)
    assert frozen(params) == before


@pytest.mark.parametrize("wanted", ["stochastic", "kahan"])
def test_without_a_bf16_weight_there_is_one_warning_and_no_effect(name, wanted, caplog):
    optimizer, params = build(name, precision=wanted)
    advance(optimizer, params, 2)
    warnings = [r.getMessage() for r in caplog.records if "no weight is bfloat16" in r.getMessage()]
    assert len(warnings) == 1 and f"`precision={wanted}` has no effect" in warnings[0]
    other, theirs = build(name)
    advance(other, theirs, 2)
    assert frozen(params) == frozen(theirs)


def test_beside_bf16_weights_fp32_ones_are_no_reason_to_warn(name, caplog):
    params = make_params([(3,)]) + make_params([(4,)], BF16)
    optimizer = hf_optim.create(name, params, precision="kahan")
    fill_grads(params, seed=1)
    optimizer.step(loss=1.0)
    hints = ("has no effect while `weight_decay`", "pass the model")  # of other settings
    assert all(any(hint in r.getMessage() for hint in hints) for r in caplog.records)
    assert ["residual" in optimizer.state[p] for p in params] == [False, True]


# ---- state ---------------------------------------------------------------------------------------------------------


def test_bf16_state_follows_a_slow_average(name):
    known = hf_optim.info(name).options
    slow = {k: 0.995 for k in ("momentum", "beta1", "beta2") if k in known}
    runs = [steady(name, {**slow, "state_dtype": kind}, 400, torch.float32)[1] for kind in ("float32", "bfloat16")]
    narrow = [k for k, v in runs[1].items() if isinstance(v, torch.Tensor) and v.dtype == BF16]
    if name == "adamw":
        assert narrow == ["m", "v"]
        assert runs[0]["v"].mean() == pytest.approx(1 - 0.995**400, rel=1e-4)
    for key in narrow:
        # rounding to nearest stops a rise to 1 at 0.61: 0.005 (1 - x) is then less than half a unit of x
        assert runs[1][key].float().mean() == pytest.approx(runs[0][key].mean().item(), rel=0.02)


def test_statistics_stay_fp32_whatever_is_asked_of_the_averages(name):
    optimizer, params = build(name, dtype=BF16, state_dtype="bfloat16", **flags_on(name))
    advance(optimizer, params, 1)
    for p in params:
        for key, slot in optimizer.slots(p, optimizer._group_view(optimizer.param_groups[0])).items():
            if not slot.narrow and slot.dtype is None:
                assert optimizer.state[p][key].dtype == torch.float32
    assert optimizer.state[params[0]]["lookahead_slow"].dtype == torch.float32


def test_fp64_weights_keep_fp64_state(name):
    optimizer, params = build(name, dtype=torch.float64, state_dtype="bfloat16", precision="stochastic")
    advance(optimizer, params, 1)
    other, theirs = build(name, dtype=torch.float64)
    advance(other, theirs, 1)
    assert everything(optimizer)["state"] == everything(other)["state"] and frozen(params) == frozen(theirs)


@pytest.mark.gpu
def test_noise_of_a_gpu_is_that_of_a_cpu():
    there, here = (precision.noise_bits(torch.empty(33, 70, device=d), 1 << 30, 1 << 29, 3) for d in ("cuda", "cpu"))
    assert torch.equal(there.cpu(), here)
