# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed on two CPU ranks: what the verdicts let through equals DDP, the rest is stopped. The first run compiles
DeepSpeed's communication for a minute or two."""

import os

import pytest
import tiny
import torch
from ranks import launch

import hf_optim
from hf_optim.trainer.loss import innermost


os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: the ranks below are CPU processes
deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

ALONE = [n for n in hf_optim.list_optimizers() if hf_optim.info(n).verdicts["zero"].startswith("fine")]
OPTIONS = {"adalo": "mode=compliant,kappa=3.0"}  # the default mode starts with steps of nearly 0


@pytest.fixture(autouse=True, scope="module")
def registered():
    hf_optim.register()


def config(stage, **more):
    zero = {"stage": stage, **more.pop("zero", {})}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, **dict.fromkeys(auto, "auto"), **more}


def as_launched():
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}


def trained(name, zero=None):
    """A run of four steps of two micro-batches, with other data on each rank, and the weights it ends with."""
    torch.manual_seed(0)
    run = tiny.trainer(
        rows=tiny.data(padded=True), optim=name, optim_args=OPTIONS.get(name), max_steps=4, deepspeed=zero,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, weight_decay=0.1, learning_rate=3e-3,
        lr_scheduler_type="linear", ddp_backend="gloo",
    )  # fmt: skip
    run.train()
    params = list(run.model.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
        return run, [p.detach().clone() for p in params]


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


def equals_ddp(names, zero):
    as_launched()
    stage, start = zero["zero_optimization"]["stage"], list(tiny.model().parameters())
    for name in names:
        plain, expected = trained(name)
        run, found = trained(name, zero)
        inner = innermost(run.optimizer)
        assert type(inner) is hf_optim.info(name).cls and run.is_deepspeed_enabled
        flat = [p.shape for group in inner.param_groups for p in group["params"]]
        assert all(len(shape) == 1 for shape in flat) and len(flat) == (0 if stage == 3 else 2)
        far = max((a - b).abs().max().item() for a, b in zip(expected, found))
        moved = max((a - b).abs().max().item() for a, b in zip(expected, start))
        print(f"{name} stage {stage}: off by {far:.2g} after moving {moved:.2g}")
        assert far <= 1e-5 and moved > 1e-3, (name, far, moved)
        assert logged(run, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_elementwise_optimizers_equal_ddp(stage):
    assert {"adamw", "adalo", "nadamw", "diffgrad", "cautious_decay_adamw"} <= set(ALONE)
    # a ratio without eps takes full steps on gradients that are 0 but for rounding (biases of keys): there any two
    # orders of summation part
    launch(2, equals_ddp, [name for name in ALONE if name != "adam_atan2"], config(stage))


def test_stage_3_equals_ddp():
    launch(2, equals_ddp, [name for name in ALONE if name != "adalo"], config(3))


def test_offload_equals_ddp_where_the_optimizer_is_kept():
    zero = config(2, zero={"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False)
    launch(2, equals_ddp, ["adamw", "adalo"], zero)


def loss_inside_the_step():
    as_launched()
    plain, _ = trained("adalo")
    run, _ = trained("adalo", config(2))
    average, losses = 0.0, logged(run, "loss")
    for loss in losses:
        average += 0.001 * (1 / (2 + loss) - average)
    groups = innermost(run.optimizer).param_groups
    assert len(losses) == 4 and len(groups) == 2  # each group is a step of its own for DeepSpeed
    assert [float(group["e"]) for group in groups] == pytest.approx([average] * 2, rel=1e-5)
    assert [group["step"] for group in groups] == [4, 4]
    # the step of the last group is the one that is logged; all groups share it
    sizes = logged(run, "optim/effective_lr")
    assert len(sizes) == 4 and sizes == pytest.approx(logged(plain, "optim/effective_lr"), rel=1e-6)
    assert sizes[-1] == pytest.approx((1 - average) / 3.0, rel=1e-5)


def test_adalo_has_its_loss_inside_the_step_of_the_engine():
    launch(2, loss_inside_the_step)


def refuses():
    as_launched()
    for name, zero, message in (
        ("sm3", config(1), "sm3 cannot be used under DeepSpeed ZeRO 1: SM3 looks at the shape"),
        ("lamb", config(2), "ZeRO 2: `trust_ratio=True`.*use FSDP2 or DDP"),
        ("stable_decay_adamw", config(3), "ZeRO 3: `decay=stable` sums"),
        ("adalo", config(3), "ZeRO 3: AdaLo counts on one call.*ZeRO 1 or 2"),
        ("adamw", config(2, zero={"offload_optimizer": {"device": "cpu"}}), '"zero_force_ds_cpu_optimizer": false'),
        ("adamw", config(2, optimizer={"type": "AdamW", "params": {"lr": "auto"}}), "`optimizer` section"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(name, zero)


def test_what_would_be_wrong_is_refused_before_the_first_step():
    launch(2, refuses)


def of_the_environment(names):
    as_launched()
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    for name, message in names.items():
        args = tiny.arguments(optim=name)
        make = hf_optim.LossAwareTrainer.get_optimizer_cls_and_kwargs
        if message:
            with pytest.raises(ValueError, match=message):
                make(args, None)
        else:
            assert make(args, None)[0] is hf_optim.info(name).cls
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    with pytest.raises(ValueError, match='"zero_force_ds_cpu_optimizer": false'):
        make(tiny.arguments(optim="adamw"), None)


def test_settings_of_accelerate_launch():
    launch(2, of_the_environment, {"adamw": "", "adalo": "", "amos": "ZeRO 1: Amos", "muon": "ZeRO 1: Muon"})
