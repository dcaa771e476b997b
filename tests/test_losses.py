# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The losses against closed forms and per-sample autograd in float64, and their scale against stock Trainer."""

import importlib
import json
import logging
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    set_seed,
)

from hf_optim.losses import LOSSES, GradTail, SoftMedian, create_loss, soft_median, split_loss_args, survey_soft_median
from hf_optim.losses.gradtail import alignment, gradient_of_logits
from hf_optim.losses.soft_median import rank_weights
from hf_optim.trainer.compute_loss import Rows


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
LAYOUTS = [(1, 8), (4, 2), (8, 1)]  # samples of a micro-batch, micro-batches of a step


def gradient(f, *values, dtype=torch.float64):
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y = f(x)
    return y.item(), torch.autograd.grad(y, x)[0]


def near(found, wanted, atol=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), atol=atol, rtol=0)


# ---- soft_median ----


def by_hand(losses, tau, support=None):
    """The definition, one rank at a time, in Python floats."""
    n = len(losses)
    order = sorted(range(n), key=lambda i: losses[i])
    far = [abs((k + 0.5) / n - 0.5) for k in range(n)]
    kernel = [math.exp(-(a - min(far)) / tau) for a in far]
    if support is not None:
        kernel = [w if a <= support / 2 or a == min(far) else 0.0 for w, a in zip(kernel, far)]
    weights = [0.0] * n
    for i, w in zip(order, kernel):
        weights[i] = w / sum(kernel)
    return sum(w * x for w, x in zip(weights, losses)), weights


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.1, 1.0, math.inf])
def test_four_losses_have_the_same_median_at_every_width(tau):
    assert gradient(lambda x: soft_median(x, tau), 1, 2, 3, 4)[0] == pytest.approx(2.5, abs=1e-12)


def test_known_gradients():
    near(gradient(soft_median, 1, 2, 3, 4)[1], [0.0379, 0.4621, 0.4621, 0.0379], atol=5e-5)
    near(gradient(soft_median, 10, 1, 3, 2, 4)[1], [0.0140, 0.0140, 0.7649, 0.1035, 0.1035], atol=5e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("support", [None, 0.5])
def test_against_the_definition(n, support):
    values = torch.randn(n, dtype=torch.float64).tolist()
    value, weights = by_hand(values, 0.2, support)
    found, grad = gradient(lambda x: soft_median(x, 0.2, support), *values)
    assert found == pytest.approx(value, abs=1e-12)
    near(grad, weights, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 1001])
def test_limits_are_the_median_and_the_mean(n):
    x = torch.randn(n, dtype=torch.float64)
    near(soft_median(x, 0.0), x.quantile(0.5), atol=1e-14)
    near(soft_median(x, 1e-6), x.quantile(0.5), atol=1e-14)
    near(soft_median(x, math.inf), x.mean(), atol=1e-14)
    near(soft_median(x, 1e12), x.mean(), atol=1e-12)


LOSS = st.floats(-1e3, 1e3).map(lambda v: round(v, 6))
BATCH = st.lists(LOSS, min_size=1, max_size=12)
TAU = st.sampled_from([0.0, 0.03, 0.1, 1.0, math.inf])
SUPPORT = st.sampled_from([None, 0.3, 1.0])


@settings(max_examples=60, deadline=None)
@given(BATCH, TAU, SUPPORT, st.floats(0.01, 100), LOSS, st.randoms())
def test_moves_with_shift_scale_and_order(values, tau, support, scale, shift, random):
    x = torch.tensor(values, dtype=torch.float64)
    value = soft_median(x, tau, support)
    near(soft_median(x * scale + shift, tau, support), value * scale + shift, atol=1e-8)
    shuffled = random.sample(values, len(values))
    near(soft_median(torch.tensor(shuffled, dtype=torch.float64), tau, support), value, atol=1e-9)
    assert min(values) - 1e-9 <= value <= max(values) + 1e-9


@settings(max_examples=100, deadline=None)
@given(BATCH, TAU, SUPPORT, st.floats(0, 1e3), st.data())
def test_rises_with_every_loss(values, tau, support, rise, data):
    i = data.draw(st.integers(0, len(values) - 1))
    higher = [*values[:i], values[i] + rise, *values[i + 1 :]]
    before, after = (soft_median(torch.tensor(v, dtype=torch.float64), tau, support) for v in (values, higher))
    assert after >= before - 1e-9


@settings(max_examples=60, deadline=None)
@given(BATCH, TAU, SUPPORT)
def test_gradient_sums_to_one_with_weights_between_zero_and_one(values, tau, support):
    grad = gradient(lambda x: soft_median(x, tau, support), *values)[1]
    assert grad.sum() == pytest.approx(1, abs=1e-12) and grad.min() >= 0 and grad.max() <= 1 + 1e-12


def test_weights_depend_on_ranks_alone():
    _, small = gradient(soft_median, 1, 2, 3, 4, 5)
    _, large = gradient(soft_median, 1, 2, 3, 4, 1e9)
    assert torch.equal(small, large)


def test_support_breaks_down_at_a_quarter():
    clean, outliers = torch.arange(1.0, 9.0), torch.arange(1.0, 9.0)
    outliers[6:] = 1e6
    assert soft_median(outliers, 0.5, support=0.5) == soft_median(clean, 0.5, support=0.5)
    assert soft_median(outliers, 0.5) > 1e4


def test_ends_of_the_input():
    x = torch.zeros(0, requires_grad=True)
    soft_median(x).backward()
    assert soft_median(x) == 0 and x.grad.shape == (0,)
    assert soft_median(torch.tensor([1.0, float("nan"), 2.0])).isnan()
    near(soft_median(torch.arange(400, dtype=torch.bfloat16)), 199.5, atol=0.5)  # ranks do not collide
    assert soft_median(torch.arange(4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: soft_median(torch.ones(2, 2)), r"shape \(n,\), one loss per sample, got \(2, 2\)"),
        (lambda: soft_median(torch.ones(2), -0.1), "`tau` must be .* got -0.1"),
        (lambda: soft_median(torch.ones(2), float("nan")), "`tau` must be .* got nan"),
        (lambda: soft_median(torch.ones(2), support=0), r"`support` must be None or in \(0, 1\], got 0"),
    ],
)
def test_soft_median_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_survey_form_and_its_defects():
    value, grad = gradient(survey_soft_median, 1, 2, 3, 4)
    assert value == pytest.approx(2.0, abs=1e-3)  # the median is 2.5
    assert grad.sum() == pytest.approx(0.970, abs=5e-4)
    fixed = gradient(lambda x: survey_soft_median(x, 0.64551), 1, 2, 3, 4)[1]  # just above half the deviation
    near(fixed, [0.140, 0.660, 0.140, 0.030], atol=5e-4)
    pair = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for scale in (1, 100):  # the padded 0 and the larger loss share T = scale sqrt(2): another mixture at every scale
        w = math.exp(-1 / (scale * 2**0.5))
        near(survey_soft_median(scale * torch.tensor([1.0, 5.0])), scale * (1 + 5 * w) / (1 + 2 * w), atol=1e-4)
    assert abs(survey_soft_median(pair + 10) - 10 - survey_soft_median(pair)) > 0.5
    assert survey_soft_median(torch.tensor([3.0])) == 3.0
    falls = {survey_soft_median: 0, soft_median: 0}
    for _ in range(300):
        x = torch.rand(5, dtype=torch.float64) * 4
        y = x.clone()
        y[torch.randint(5, ())] += torch.rand(()) * 4
        for f in falls:
            falls[f] += bool(f(y) < f(x) - 1e-9)
    assert falls[survey_soft_median] > 3 and falls[soft_median] == 0


def test_a_count_is_so_many_equal_samples_at_their_middle_rank():
    losses, counts = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1, 2, 5])
    # sorted: counts 2, 5, 1 of 8, mid-ranks 1, 4.5, 7.5 of 8, so |r - 1/2| is .375, .0625, .4375
    kernel = [2 * math.exp(-0.3125 / 0.1), 5.0, math.exp(-0.375 / 0.1)]
    near(
        rank_weights(losses, counts, 0.1, None),
        torch.tensor([kernel[2], kernel[0], kernel[1]]) / sum(kernel),
    )
    padded = rank_weights(torch.tensor([3.0, 0.0, 1.0, 2.0]), torch.tensor([1, 0, 2, 5]), 0.1, None)
    assert padded[1] == 0
    near(padded[[0, 2, 3]], rank_weights(losses, counts, 0.1, None))


# ---- scale ----


def bert(which="single_label_classification", labels=3):
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(
        BertConfig(vocab_size=64, max_position_embeddings=32, num_labels=labels, problem_type=which, **sizes, **rates)
    )


def texts(which="single_label_classification", labels=3):
    draw = torch.Generator().manual_seed(1)
    made = []
    for row in tiny.data():
        label = torch.randint(0, labels, (), generator=draw)
        if which == "regression" or labels == 1:
            label = torch.randn(labels, generator=draw)
        if which == "multi_label_classification":
            label = torch.randint(0, 2, (labels,), generator=draw).float()
        made.append({"input_ids": row["input_ids"], "labels": label})
    return made


def train(net, rows, loss=None, layout=(8, 1), **options):
    """Two steps of plain SGD: the weights are linear in the gradients."""
    fixed = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 2}
    batch, pieces = {"per_device_train_batch_size": layout[0]}, {"gradient_accumulation_steps": layout[1]}
    extra = options.pop("extra", {})
    if loss is not None:
        extra = {**extra, "compute_loss_func": loss, "callbacks": [loss]}
    run = tiny.trainer(net=net, rows=rows, extra=extra, **{**fixed, **batch, **pieces, **options})
    run.train()
    return run


def assert_same_run(a, b, atol=1e-6):
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (a, b)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # Trainer logs rounded ones
    for x, y in zip(tiny.weights(a), tiny.weights(b)):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_wide_soft_median_is_the_loss_of_a_language_model(layout, padded):
    net = tiny.model()
    found = train(net, tiny.data(padded=padded), SoftMedian(net, tau=1e9), layout)
    assert_same_run(found, train(tiny.model(), tiny.data(padded=padded), layout=layout))


# stock Trainer at 8 x 1 only: it takes the mean that BERT returns for a part of the sum, and does not divide it by
# the accumulation steps
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "which, labels",
    [
        ("single_label_classification", 3),
        ("regression", 1),
        ("regression", 2),
        ("multi_label_classification", 3),
        (None, 3),
        (None, 1),
    ],
)
def test_wide_soft_median_is_the_loss_of_a_classifier(layout, which, labels):
    net, rows = bert(which, labels), texts(which, labels)
    found = train(net, rows, SoftMedian(net, tau=1e9), layout)
    assert_same_run(found, train(bert(which, labels), rows))


@pytest.mark.parametrize("which", LOSSES)
def test_evaluation_is_the_plain_mean(which):
    net, rows = tiny.model(), tiny.data(16, seed=7, padded=True)
    options = {"tau": 0.0} if which == "soft_median" else {"warmup": 3}
    run = train(net, tiny.data(), create_loss(which, net, **options), max_steps=5, extra={"eval_dataset": rows})
    found = run.evaluate()["eval_loss"]
    run.compute_loss_func = None
    assert found == pytest.approx(run.evaluate()["eval_loss"], abs=1e-5)


def test_mean_of_medians_over_the_micro_batches():
    net, row = tiny.model(), tiny.data(16)
    seen = []

    class Listening(SoftMedian):
        def __call__(self, outputs, labels, num_items_in_batch=None):
            loss = super().__call__(outputs, labels, num_items_in_batch)
            each = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").mean(1)
            items = labels[:, 1:].numel()
            seen.append((loss.item(), each.quantile(0.5).item() * items / float(num_items_in_batch)))
            return loss

    train(net, row, Listening(net, tau=0.0), (4, 2), max_steps=1)
    assert len(seen) == 2
    for found, wanted in seen:
        assert found == pytest.approx(wanted, abs=1e-6)


def of_rank(which, options, average, padded):
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE="2", LOCAL_RANK=str(dist.get_rank()))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    net = tiny.model()
    loss = create_loss(which, net, **options)
    run = train(
        net, tiny.data(padded=padded), loss, (4, 1), max_steps=options.get("warmup", 0) + 2, ddp_backend="gloo",
        average_tokens_across_devices=average,
    )  # fmt: skip
    alone = torch.load(os.environ["ALONE"])
    for x, y in zip(tiny.weights(run), alone["weights"]):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses == pytest.approx(alone["losses"], abs=2e-4), (losses, alone["losses"])


@pytest.mark.parametrize(
    "which, options, average, padded",
    [
        ("soft_median", {"tau": 1e9}, True, True),
        ("soft_median", {"tau": 0.1}, True, True),
        ("soft_median", {"tau": 0.1}, False, False),
        ("gradtail", {"warmup": 3, "decay": 0.5}, True, True),
    ],
)
def test_two_ranks_are_one_process_with_their_batches(which, options, average, padded, tmp_path, monkeypatch):
    net, rows = tiny.model(), tiny.data(padded=padded)
    wide = options.get("tau") == 1e9  # then against stock Trainer
    alone = train(
        net, rows, None if wide else create_loss(which, net, **options), max_steps=options.get("warmup", 0) + 2
    )
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    torch.save({"weights": tiny.weights(alone), "losses": losses}, tmp_path / "alone.pt")
    monkeypatch.setenv("ALONE", str(tmp_path / "alone.pt"))
    ranks.launch(2, of_rank, which, options, average, padded)


def toy(size=4, classes=3, bias=True, dtype=torch.float64, **config):
    """An output layer that says of itself what the losses want to know."""
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.head = torch.nn.Linear(size, classes, bias=bias).to(dtype)
    net.config = SimpleNamespace(**{"num_labels": classes, "problem_type": None, **config})
    net.get_output_embeddings = lambda: net.head
    return net


def forward(net, x):
    return {"logits": net.head(x)}


def unequal_ranks(num_items):
    net = toy()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    whole = soft_median(F.cross_entropy(net.head(x), y, reduction="none"), 0.1)
    wanted = torch.autograd.grad(whole, net.head.weight)[0]
    own = slice(0, 3) if dist.get_rank() == 0 else slice(3, 5)
    part = SoftMedian(net)(forward(net, x[own]), y[own], num_items)
    (grad,) = torch.autograd.grad(part, net.head.weight)
    dist.all_reduce(grad)
    value = part.detach().clone()
    dist.all_reduce(value)
    share = 1 if num_items else 2  # without a count: the mean over the ranks
    near(grad / share, wanted, atol=1e-12)
    near(value / share, whole.detach(), atol=1e-12)


@pytest.mark.parametrize("num_items", [5, None])
def test_ranks_with_unequal_batches(num_items):
    ranks.launch(2, unequal_ranks, num_items)


def test_masked_batch_is_zero_with_a_gradient():
    net = toy()
    y = torch.full((4,), -100)
    loss = SoftMedian(net)(forward(net, torch.randn(4, 4, dtype=torch.float64)), y, 7)
    loss.backward()
    assert loss == 0 and not net.head.weight.grad.any()


def test_only_causal_language_models_are_shifted():
    set_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=5)
    assert SoftMedian(tiny.model()).shift
    net, ids = BertForTokenClassification(config).eval(), torch.arange(12).view(2, 6)
    loss = SoftMedian(net, tau=1e9)(net(ids), ids % 5)
    near(loss, net(ids, labels=ids % 5).loss.detach())


# ---- GradTail ----


def per_sample_gradients(net, x, y):
    """(n, C, d + 1): gradients of the weight and of the bias, by one backward pass each."""
    made = []
    for i in range(len(x)):
        loss = F.cross_entropy(net.head(x[i : i + 1]), y[i : i + 1])
        parts = torch.autograd.grad(loss, list(net.head.parameters()))
        made.append(torch.cat([parts[0], *(p[:, None] for p in parts[1:])], 1))
    return torch.stack(made)


def rows_of(net, x, y):
    return Rows(net.head(x), y, torch.ones_like(y), len(y), "single_label_classification")


@pytest.mark.parametrize("bias", [True, False])
def test_rank_one_identities(bias):
    net = toy(bias=bias)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    each = per_sample_gradients(net, x, y)
    delta = gradient_of_logits(rows_of(net, x, y))
    h = torch.cat([x, torch.ones(6, 1, dtype=x.dtype)], 1) if bias else x
    near(torch.einsum("nc,nd->ncd", delta, h), each, atol=1e-14)
    near(delta, net.head(x).softmax(1) - F.one_hot(y, 3), atol=1e-14)
    mean = each.mean(0)
    wanted = (each * mean).sum((1, 2)) / (each.norm(dim=(1, 2)) * mean.norm())
    near(alignment(delta, h, mean, 0.0), wanted, atol=1e-14)
    dots = wanted * each.norm(dim=(1, 2)) * mean.norm()
    near(dots.mean(), mean.square().sum(), atol=1e-14)


def weights_by_hand(net, batches, decay, warmup, kernel, alpha):
    """The definition from per-sample autograd gradients; sums over all steps instead of running ones."""
    found, gradients, cosines, raw = [], [], [], []
    for x, y in batches:
        each = per_sample_gradients(net, x, y)

        def running(values):
            powers = [decay ** (len(values) - 1 - i) for i in range(len(values))]
            return sum(p * v for p, v in zip(powers, values)) / sum(powers)

        c, w = None, torch.ones(len(y), dtype=torch.float64)
        if gradients:
            mean = running(gradients)
            c = (each * mean).sum((1, 2)) / (each.norm(dim=(1, 2)) * mean.norm())
        if cosines:
            std = (running([(c * c).mean() for c in cosines]) - running([c.mean() for c in cosines]) ** 2).sqrt()
            s = c / std
            k = torch.exp(-s * s / 2) if kernel == "orthogonal" else 1 / (1 + torch.exp(s))
            w = (1 + alpha * k).clamp(0.5, 1.8)
        found.append(w / running(raw) if len(found) >= warmup else torch.ones_like(w))
        gradients.append(each.mean(0))
        if len(gradients) > 1:
            cosines.append(c)
        if len(cosines) > 1:
            raw.append(w.mean())
    return found


@pytest.mark.parametrize("kernel", ["orthogonal", "low_alignment"])
def test_gradtail_against_per_sample_gradients(kernel):
    net = toy()
    batches = [(torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))) for _ in range(6)]
    loss = GradTail(net, kernel=kernel, decay=0.8, warmup=4, max_weight=1.8, eps=1e-15)
    for (x, y), wanted in zip(batches, weights_by_hand(net, batches, 0.8, 4, kernel, 1.0)):
        each = F.cross_entropy(net.head(x), y, reduction="none")
        value = loss(forward(net, x), y)
        near(value, (wanted * each).sum() / 7, atol=1e-12)
        # the weights carry no gradient
        found = torch.autograd.grad(value, net.head.weight)[0]
        near(found, torch.autograd.grad((wanted * each).sum() / 7, net.head.weight)[0], atol=1e-12)
        loss.step()
    assert wanted.std() > 0.03


@pytest.mark.parametrize("source", ["head", "bias"])
def test_weights_follow_their_samples(source):
    net = toy()
    loss = GradTail(net, gradient=source, warmup=3)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    for _ in range(4):
        loss(forward(net, torch.randn(6, 4, dtype=torch.float64)), torch.randint(0, 3, (6,)))
        loss.step()
    order = torch.randperm(6)
    found = []
    for i in (torch.arange(6), order):
        forward(net, x[i])
        found.append(loss.weights(rows_of(net, x[i], y[i])))
    assert found[0].std() > 0.01 and not found[0].requires_grad
    near(found[1], found[0][order], atol=1e-12)


def test_bias_gradient_is_the_cosine_of_the_logit_gradients():
    net = toy()
    loss = GradTail(net, gradient="bias", decay=0.0, warmup=3)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    for _ in range(3):
        loss(forward(net, x), y)
        loss.step()
    delta = gradient_of_logits(rows_of(net, x, y))
    c = F.cosine_similarity(delta, delta.mean(0, keepdim=True), dim=1)
    w = 1 + torch.exp(-(c**2) / (2 * c.var(correction=0)))
    near(loss.weights(rows_of(net, x, y)), w / w.mean(), atol=1e-6)


def test_masked_rows_leave_no_trace():
    net, other = toy(), toy()
    a, b = GradTail(net, warmup=3, decay=0.5), GradTail(other, warmup=3, decay=0.5)
    for _ in range(5):
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
        y[4:] = -100
        near(a(forward(net, x), y), b(forward(other, x[:4]), y[:4]), atol=1e-14)
        a.step()
        b.step()
    for name in a.averages:
        near(a.averages[name], b.averages[name], atol=1e-14)


def test_a_step_that_is_not_finite_is_left_out():
    net = toy()
    loss = GradTail(net, warmup=3)
    for scale in (1.0, 1.0, float("nan"), 1.0, 1.0):
        value = loss(forward(net, scale * torch.randn(6, 4, dtype=torch.float64)), torch.randint(0, 3, (6,)))
        loss.step()
    assert loss.steps == 4 and value.isfinite()
    assert all(average.isfinite().all() for average in loss.averages.values())


def test_warmup_is_the_plain_loss_and_alpha_0_stays_it():
    plain = train(tiny.model(), tiny.data(padded=True), max_steps=6)
    net = tiny.model()
    off = train(net, tiny.data(padded=True), GradTail(net, alpha=0.0, warmup=3), max_steps=6)
    net = tiny.model()
    warm = train(net, tiny.data(padded=True), GradTail(net, warmup=100), max_steps=6)
    net = tiny.model()
    acts = train(net, tiny.data(padded=True), GradTail(net, warmup=3), max_steps=6)
    for a, b, c, d in zip(*map(tiny.weights, (plain, off, warm, acts))):
        assert torch.equal(a, b) and torch.equal(a, c)  # bit for bit
        assert not torch.equal(a, d)


@pytest.mark.parametrize("make, rows", [(tiny.model, tiny.data(padded=True)), (bert, texts())], ids=["gpt2", "bert"])
def test_gradtail_does_not_depend_on_the_accumulation(make, rows):
    runs = []
    for layout in LAYOUTS:
        net = make()
        runs.append(train(net, rows, GradTail(net, warmup=3, decay=0.5), layout, max_steps=6))
    assert_same_run(runs[0], runs[2], atol=2e-6)
    assert_same_run(runs[1], runs[2], atol=2e-6)


def test_averages_stay_in_fp32_under_autocast():
    net = toy(dtype=torch.float32)
    loss = GradTail(net, warmup=3)
    for _ in range(4):
        x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss(forward(net, x), y)
        loss.step()
    assert {average.dtype for average in loss.averages.values()} == {torch.float32} and len(loss.averages) == 3


# ---- checkpoints ----


def resumable(folder, **options):
    net = tiny.model()
    loss = GradTail(net, warmup=3, decay=0.5)
    fixed = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 4, "optim": "sgd", "max_steps": 6}
    made = tiny.arguments(**{"learning_rate": 0.5, **options})
    for key, value in fixed.items():
        setattr(made, key, value)
    cls = importlib.import_module("hf_optim").LossAwareTrainer
    return cls(net, made, train_dataset=tiny.data(), compute_loss_func=loss, callbacks=[loss]), loss


def test_resumed_is_uninterrupted(tmp_path, caplog):
    whole, _ = resumable(tmp_path / "run")
    whole.train()
    resumed, loss = resumable(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed.train(resume_from_checkpoint=True)
    assert loss.steps == 6

    # in another folder, which holds the leavings of another run
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "else" / "checkpoint-4")
    state = tmp_path / "else" / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"][0]["loss"] += 1
    state.write_text(json.dumps(content))
    source = str(tmp_path / "run" / "checkpoint-4")
    named, loss = resumable(tmp_path / "else", resume_from_checkpoint=source)
    with caplog.at_level(logging.WARNING):
        named.train(resume_from_checkpoint=source)
        assert loss.steps == 6 and "GradTail" not in caplog.text
        for a, b, c in zip(*map(tiny.weights, (whole, resumed, named))):
            assert torch.equal(a, b) and torch.equal(a, c)
        lost, loss = resumable(tmp_path / "else")
        lost.train(resume_from_checkpoint=source)
    assert loss.steps == 2 and "GradTail found no `gradtail.pt` of this run" in caplog.text


def test_a_second_training_starts_anew():
    net = tiny.model()
    loss = GradTail(net, warmup=3)
    run = train(net, tiny.data(), loss, max_steps=3)
    run.train()
    assert loss.steps == 3


# ---- what cannot work ----


@pytest.mark.parametrize(
    "call, which, message",
    [
        (lambda net: create_loss("soft_medain", net), ValueError, "unknown loss 'soft_medain'; did you mean 'soft_me"),
        (lambda net: create_loss("soft_median", net, tua=1), TypeError, "soft_median: unknown option `tua`; did you"),
        (
            lambda net: create_loss("soft_median", net, tau="-1"),
            ValueError,
            r"`tau` must be a float in \[0, inf\), go",
        ),
        (lambda net: create_loss("soft_median", net, support=2), ValueError, r"`support` must be a float in \(0, 1\]"),
        (lambda net: create_loss("gradtail", net, kernel="hard"), ValueError, "one of 'orthogonal', 'low_alignment'"),
        (lambda net: create_loss("gradtail", net, warmup=2), ValueError, r"`warmup` must be an int in \[3, inf\)"),
        (lambda net: split_loss_args("tau"), ValueError, "`loss_args` must look like 'name=value,name=value'"),
        (lambda net: SoftMedian(net)({"loss": 1}, None), ValueError, "needs `outputs.logits`.*use_liger_kernel"),
        (lambda net: SoftMedian(net)(forward(net, torch.ones(2, 4).double()), None), ValueError, "needs `labels`"),
        (
            lambda net: GradTail(net)({"logits": torch.ones(2, 3)}, torch.ones(2).long()),
            RuntimeError,
            "saw no forward pass of the output layer.*gradient=bias",
        ),
        (
            lambda net: GradTail(net)({"logits": 2 * net.head(torch.ones(2, 4).double())}, torch.ones(2).long()),
            ValueError,
            "are not what the output layer returned.*gradient=bias",
        ),
        (
            lambda net: GradTail(net)(forward(net, torch.ones(2, 4).double()), torch.ones(2).long(), 2),
            RuntimeError,
            r"callbacks=\[loss\]",
        ),
        (
            lambda net: SoftMedian(net)(
                forward(net, torch.ones(2, 4).double()), torch.ones(2).long(), torch.ones(2, 1)
            ),
            ValueError,
            "DataParallel.*torchrun",
        ),
    ],
)
def test_errors_say_what_to_do(call, which, message):
    with pytest.raises(which, match=message):
        call(toy())


def test_a_model_without_an_output_layer_is_refused():
    net = toy()
    net.get_output_embeddings = lambda: None
    net.config.num_labels = 5
    with pytest.raises(ValueError, match=r"no output layer in Module.*num_labels` \(5\)"):
        GradTail(net)
    GradTail(net, gradient="bias")


def test_a_head_that_scores_every_token_is_refused():
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **sizes))
    with pytest.raises(ValueError, match=r"\(8 rows of 3\).*\(8, 12, 3\)"):
        train(net, texts(), GradTail(net))
    assert train(net, texts(), GradTail(net, gradient="bias", warmup=3), max_steps=4).state.global_step == 4


def test_label_smoothing_is_refused():
    net = tiny.model()
    with pytest.raises(ValueError, match=r"ignores `label_smoothing_factor` \(0.1\)"):
        train(net, tiny.data(), SoftMedian(net), label_smoothing_factor=0.1)


# ---- the scripts ----


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()

    return run


def common(folder):
    fixed = "--do_train --do_eval --use_cpu --report_to none --max_steps 2 --per_device_train_batch_size 4".split()
    return [*fixed, "--max_eval_samples", 8, "--max_train_samples", 32, "--output_dir", folder, "--save_steps", 2]


def clm(folder):
    for part in ("train", "validation"):
        text = (SCRIPTS / "data" / "shakespeare" / f"{part}.txt").read_text().splitlines(keepends=True)[:200]
        (folder / f"{part}.txt").write_text("".join(text))
    files = ["--train_file", folder / "train.txt", "--validation_file", folder / "validation.txt"]
    return [*files, "--block_size", 8, *common(folder / "out")]


def test_clm_with_a_loss(script, tmp_path):
    script("finetune_clm", *clm(tmp_path), "--loss", "gradtail", "--loss_args", "warmup=3,gradient=bias")
    saved = torch.load(tmp_path / "out" / "checkpoint-2" / "gradtail.pt", weights_only=True)
    assert saved["steps"] == 2 and saved["gradient"].shape[1] == 1
    with pytest.raises(TypeError, match="soft_median: unknown option `tao`; did you mean 'tau'"):
        script("finetune_clm", *clm(tmp_path), "--loss", "soft_median", "--loss_args", "tao=0.2")
    with pytest.raises(ValueError, match=re.escape("`--loss_args` ('tau=0.2') needs `--loss`")):
        script("finetune_clm", *clm(tmp_path), "--loss_args", "tau=0.2")


def test_classification_with_a_loss(script, tmp_path):
    from transformers import BertModel, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocab), max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    source = ["--model_name_or_path", tmp_path / "bert", *common(tmp_path / "out")]
    script("finetune_classification", *source, "--loss", "soft_median", "--loss_args", "tau=0.2,support=0.8")
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_samples"] == 32 and math.isfinite(results["eval_loss"])
