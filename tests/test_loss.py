# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The loss that reaches the optimizer is the one back-propagated, whoever computed it and in however many pieces."""

import logging

import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import Accelerator
from ranks import as_launched, launch
from transformers import Trainer

import hf_optim
from hf_optim.core import sharding
from hf_optim.trainer.loss import _warn_replaced, deliver_loss, innermost


@pytest.fixture(autouse=True, scope="module")
def registered():
    hf_optim.register()


def run(**options):
    extra = options.pop("extra", None)
    rows = tiny.data(padded=options.pop("padded", False))
    fixed = {"optim": "adalo", "optim_args": "mode=compliant", "lr_scheduler_type": "constant", "max_steps": 4}
    made = tiny.trainer(rows=rows, extra=extra, **{**fixed, **options})
    seen = tiny.losses_seen(made)
    made.train()
    return seen, made


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_accumulation_gives_the_same_loss_and_weights(padded):
    runs = {
        (batch, pieces): run(per_device_train_batch_size=batch, gradient_accumulation_steps=pieces, padded=padded)
        for batch, pieces in ((1, 8), (4, 2), (8, 1))
    }
    whole, reference = runs.pop((8, 1))
    assert len(whole) == 4
    for seen, made in runs.values():
        assert seen == pytest.approx(whole, abs=1e-6)
        for a, b in zip(tiny.weights(made), tiny.weights(reference)):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_it_is_the_loss_that_trainer_logs():
    seen, made = run(gradient_accumulation_steps=2)
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert seen == pytest.approx(logged, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.2},
        {"average_tokens_across_devices": False},
        {"extra": {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()}},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["label smoothing", "no token average", "compute_loss_func", "evaluation in between"],
)
def test_whoever_computes_the_loss(options):
    if "eval_strategy" in options:
        options = {**options, "extra": {"eval_dataset": tiny.data(8, seed=5)}}
    seen, made = run(gradient_accumulation_steps=2, padded=True, **options)
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(seen) == 4 and seen == pytest.approx(logged, abs=1e-6)


def test_step_size_in_the_logs_is_the_one_used():
    seen, made = run()
    average, logged = 0.0, [e["optim/effective_lr"] for e in made.state.log_history if "optim/effective_lr" in e]
    for loss, size in zip(seen, logged):
        average += 0.001 * (1 / (2 + loss) - average)
        assert size == pytest.approx((1 - average) / 3.0, rel=1e-6)
    assert len(logged) == 4


def test_stock_trainer_is_told_what_to_do():
    with pytest.raises(RuntimeError, match="LossAwareTrainer(.|\n)*hf-optim run"):
        tiny.trainer(cls=Trainer, optim="adalo").train()


def test_mixin_in_front_of_a_subclass_that_overrides_training_step():
    class Doubled(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = 2 * self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    class Mixed(hf_optim.LossAwareMixin, Doubled):
        pass

    made = tiny.trainer(cls=Mixed, optim="adalo", max_steps=2)
    seen = tiny.losses_seen(made)
    made.train()
    assert seen == pytest.approx([entry["loss"] for entry in made.state.log_history if "loss" in entry], abs=1e-6)


def test_plain_accelerate_loop_with_accumulation():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    deliver_loss(accelerator)
    deliver_loss(accelerator)  # twice is once
    w = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.ParameterList([w])
    model, optimizer = accelerator.prepare(model, hf_optim.create("adalo", [w], mode="loss", kappa=1.0, beta2=0.0))
    for scale in (1.0, 3.0):
        with accelerator.accumulate(model):
            accelerator.backward(scale * w.sum())
            optimizer.step()
            optimizer.zero_grad()
    # mean of the two losses 3 and 9; gradient mean 2; m = 0.1 * 2
    assert innermost(optimizer).effective_lr() == pytest.approx(6.0)
    torch.testing.assert_close(w.detach(), torch.full((3,), 1 - 6.0 * 0.2))


def test_report_is_replaced_not_added():
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = hf_optim.create("adalo", [w], mode="loss", kappa=1.0, beta2=0.0)
    w.grad = torch.ones(1)
    optimizer.report_loss(5.0)
    optimizer.report_loss(0.5)
    optimizer.step()
    assert optimizer.effective_lr() == pytest.approx(0.5)


# ---- ranks ----


class Mixed(hf_optim.LossAwareMixin, Trainer):
    pass


def train_on_this_rank(broken, folder):
    as_launched()
    if broken:
        sharding.mean_over_ranks = lambda x: x
    made = tiny.trainer(
        cls=Mixed, rows=tiny.data(padded=True), optim="adalo", optim_args="mode=compliant", max_steps=4,
        per_device_train_batch_size=4, lr_scheduler_type="constant", ddp_backend="gloo",
    )  # fmt: skip
    made.train()
    torch.save((tiny.weights(made), innermost(made.optimizer).param_groups[0]["e"]), folder / str(dist.get_rank()))


def train_on_two_ranks(folder, broken=False):
    launch(2, train_on_this_rank, broken, folder)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def test_ranks_with_different_data_stay_identical_and_equal_one_process(tmp_path):
    (first, e0), (second, e1) = train_on_two_ranks(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(e0, e1)
    _, alone = run(padded=True, per_device_train_batch_size=8)
    for a, b in zip(first, tiny.weights(alone)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_without_the_mean_over_ranks_they_drift_apart(tmp_path):
    (first, e0), (second, e1) = train_on_two_ranks(tmp_path, broken=True)
    assert not torch.equal(e0, e1) and not all(torch.equal(a, b) for a, b in zip(first, second))


# ---- the guard ----


class Poisoned(hf_optim.LossAwareTrainer):
    bad_steps = ()
    value = float("nan")

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.value if self.state.global_step in self.bad_steps else loss


@pytest.mark.parametrize("optim", ["adalo", "adamw", "adamw_torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_step_is_skipped_and_counted(optim, value, caplog):
    class Run(Poisoned):
        pass

    Run.bad_steps, Run.value = (1, 2), value
    made = tiny.trainer(cls=Run, optim=optim, max_steps=5)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.skipped_steps == 2 and "step 2 skipped" in caplog.text
    assert all(p.isfinite().all() for p in tiny.weights(made))
    logs = [e for e in made.state.log_history if "learning_rate" in e]
    assert [e.get("optim/skipped_steps", 0) for e in logs] == [0, 1, 2, 2, 2]
    if optim != "adamw_torch":
        assert {s["step"] for s in innermost(made.optimizer).state.values()} == {3}


def test_too_many_in_a_row_end_the_run():
    class Run(Poisoned):
        bad_steps = range(1, 100)

    made = tiny.trainer(cls=Run, optim="adamw", max_steps=50, extra={"max_skipped_steps": 3})
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        made.train()
    assert made.state.global_step == 3 and all(p.isfinite().all() for p in tiny.weights(made))


def test_a_window_that_was_cut_short_is_forgotten(monkeypatch):
    class Interrupted(hf_optim.LossAwareTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    seen, report = [], hf_optim.AdaLo.report_loss
    monkeypatch.setattr(hf_optim.AdaLo, "report_loss", lambda o, loss: seen.append(float(loss)) or report(o, loss))
    tiny.trainer(optim="adalo", gradient_accumulation_steps=2, max_steps=2).train()
    wanted = seen[:]
    run = tiny.trainer(Interrupted, optim="adalo", gradient_accumulation_steps=2, max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert seen == wanted
    run.train()
    assert seen[2:] == pytest.approx(wanted, rel=1e-6) and len(seen) == 4


def test_skips_are_counted_from_the_start_of_a_run():
    class Run(Poisoned):
        bad_steps = range(100)

    run = tiny.trainer(Run, optim="adamw", max_steps=3, extra={"max_skipped_steps": 2})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^2 steps in a row .* the last at step 2"):
            run.train()
    Run.bad_steps = ()
    run.train()
    assert run.skipped_steps == 0


def test_several_backward_passes_for_a_step_are_told_of(caplog):
    class Twice(hf_optim.LossAwareTrainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            return super().training_step(*args, **kwargs)

    _warn_replaced.cache_clear()
    tiny.trainer(Twice, optim="adalo", max_steps=2).train()
    assert sum("before it stepped with the last one" in message for message in caplog.messages) == 1
    caplog.clear()
    _warn_replaced.cache_clear()
    tiny.trainer(optim="adalo", gradient_accumulation_steps=2, max_steps=2).train()
    assert not any("before it stepped" in message for message in caplog.messages)
