# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Ranks stay copies of each other, and together are what one process is: DDP, and Trainer under DDP and FSDP2."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from engine import BF16, everything, frozen, moments
from ranks import as_launched, launch, shard_on_cpu
from safetensors.torch import load_file
from test_resume import result
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_optim
from hf_optim.core import sharding
from hf_optim.trainer import layout
from hf_optim.trainer.loss import innermost


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
NAMES = hf_optim.list_optimizers()
SAMPLE = ("adalo", "adafactor_corrected", "muon")  # steps by the loss, by reductions, by whole matrices
STOCHASTIC = {"precision": "stochastic", "state_dtype": "bfloat16"}


pytestmark = pytest.mark.usefixtures("forking_trainers")


def decay(name):
    """Weight decay, where no bound takes its place."""
    return {} if hf_optim.info(name).preset.get("decay") == "cpr" else {"weight_decay": 0.1}


# ---- DDP -----------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """An embedding, matrices, a convolution, vectors and a scalar."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.convolution = torch.nn.Conv1d(6, 5, 2)
        self.norm = torch.nn.LayerNorm(5)
        self.hidden = torch.nn.Linear(5, 7)
        self.output = torch.nn.Linear(7, 3)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, ids):
        x = self.convolution(self.embedding(ids).transpose(1, 2)).mean(2)
        return self.scale * self.output(self.hidden(self.norm(x)).tanh())


def train_replicas(name, options, dtype, steps):
    """(optimizer, losses of this rank) after steps on data of its own."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Net().to(dtype))
    optimizer = hf_optim.create(name, model.module, **decay(name), **options)
    draw = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 11, (4, 5), generator=draw)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids).float(), ids[:, 0] % 3)
        loss.backward()
        optimizer.step(loss=loss if optimizer.needs_loss else None)
        losses.append(loss.item())
    return optimizer, losses


def fingerprints(optimizer):
    """One digest of all weights, state and groups for each rank."""
    mine = hashlib.sha256(repr(everything(optimizer)).encode()).hexdigest()
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return set(found)


def replicas_stay_equal(names, steps):
    everyone = [None] * dist.get_world_size()
    for name in names:
        for options, dtype in (({}, torch.float32), ({**STOCHASTIC, **moments(name)}, BF16)):
            optimizer, losses = train_replicas(name, options, dtype, steps)
            dist.all_gather_object(everyone, losses)
            assert all(a not in everyone[:i] for i, a in enumerate(everyone)), "ranks saw the same data"
            assert len(fingerprints(optimizer)) == 1, f"{name} {options}: replicas drifted apart"
            assert [s["step"] for s in optimizer.state.values()] == [steps] * 10


WORLDS = [pytest.param(2, SAMPLE, 40), *(pytest.param(w, NAMES, 100, marks=pytest.mark.slow) for w in (2, 3))]


@pytest.mark.parametrize("world, names, steps", WORLDS, ids=["sample", "2", "3"])
def test_replicas_stay_equal_bit_for_bit(world, names, steps):
    launch(world, replicas_stay_equal, names, steps)


def replicas_would_drift():
    for name, fault in (("adamw", "seed"), ("adalo", "loss")):
        options = {**STOCHASTIC, "seed": dist.get_rank()} if fault == "seed" else {"mode": "compliant"}
        if fault == "loss":
            sharding.mean_over_ranks = lambda x: x
        optimizer, _ = train_replicas(name, options, BF16 if fault == "seed" else torch.float32, steps=20)
        for group in optimizer.param_groups:
            group["seed"] = 0  # not what is compared
        assert len(fingerprints(optimizer)) == dist.get_world_size(), fault


def test_replicas_that_part_are_seen():
    """What the test above is here to catch: noise of each rank's own, a loss that is not averaged."""
    launch(2, replicas_would_drift)


# ---- Trainer: as many processes as there were accumulated batches --------------------------------------------------


def trained(name, ranks, bf16=False, net=None, **options):
    """Eight steps of two micro-batches, accumulated by one process or one for each of two ranks, in the same order.

    Sequences have different numbers of labels, so that the losses of the ranks count differently."""
    net = net or (tiny.model().bfloat16() if bf16 else tiny.model())
    options |= {"optim_args": "precision=stochastic"} if bf16 else {}
    options |= {"ddp_backend": "gloo"} if ranks > 1 else {}
    run = tiny.trainer(
        net=net, rows=tiny.data(padded=True), optim=name, max_steps=8, per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // ranks, **decay(name), **options,
    )  # fmt: skip
    seen, mean = [], sharding.mean_over_ranks

    def mean_over_ranks(loss):
        seen.append(mean(loss))
        return seen[-1]

    sharding.mean_over_ranks = mean_over_ranks
    run.train()
    sharding.mean_over_ranks = mean
    assert len(seen) == (8 if hf_optim.info(name).needs_loss else 0)
    return run, seen


def trace(run, seen):
    return {**result(run), "losses seen": frozen(seen)}


def equal_one_process(expected, bf16):
    as_launched()
    for name, wanted in expected.items():
        run, seen = trained(name, ranks=2, bf16=bf16)
        found = trace(run, seen)
        assert run.args.world_size == 2 and run.model_wrapped is not run.model
        if dist.get_rank():  # only the first rank logs
            found["logs"] = wanted["logs"]
        different = [key for key in wanted if found[key] != wanted[key]]
        assert not different and len(wanted["logs"]) == 8, f"{name}: {different}"


KINDS = [pytest.param(SAMPLE, False), *(pytest.param(NAMES, b, marks=pytest.mark.slow) for b in (False, True))]


@pytest.mark.parametrize("names, bf16", KINDS, ids=["sample", "fp32", "bf16"])
def test_two_processes_equal_two_accumulated_batches_bit_for_bit(names, bf16):
    launch(2, equal_one_process, {name: trace(*trained(name, ranks=1, bf16=bf16)) for name in names}, bf16)


# ---- Trainer: FSDP2 ------------------------------------------------------------------------------------------------


def odd_model():
    """Tied embeddings, a frozen matrix among trained ones, a parameter that no gradient reaches."""
    net = tiny.model()
    assert net.lm_head.weight is net.transformer.wte.weight
    net.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    net.transformer.h[1].spare = torch.nn.Parameter(torch.ones(5, 3))
    for layer in net.transformer.h:  # the true gradient of a key's bias is 0: what moves it is the rounding of others
        layer.attn.c_attn.bias.requires_grad_(False)
    return net


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def values(run):
    """Every weight and state tensor by name, whole; on every rank."""
    found, state = {}, innermost(run.optimizer).state
    for name, p in run.model.named_parameters():
        for key, value in {"weight": p.detach(), **state.get(p, {})}.items():
            found[f"{name} {key}"] = full(value)
    return found


def trained_odd(name, ranks, **options):
    # no clipping: the norm of all gradients is added up in another order on shards
    return trained(name, ranks, net=odd_model(), max_grad_norm=0, **options)[0]


def sharded_equal_one_process(expected):
    as_launched(), shard_on_cpu()
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    for name, wanted in expected.items():
        run, info = trained_odd(name, ranks=2, fsdp=True, fsdp_config=layers), hf_optim.info(name)
        assert all(isinstance(p, DTensor) for p in run.model.parameters())
        found = values(run)
        assert found.keys() == wanted.keys()
        exact = info.verdicts["zero"].startswith("fine")  # nothing is added up
        for key, a in wanted.items():
            a, b = torch.as_tensor(a).double(), torch.as_tensor(found[key]).double()
            far = ((a - b).abs().max() / a.abs().max()).item() if a.any() else b.abs().max().item()
            allowed = 0 if exact else 1e-6 if key.endswith(" weight") else 5e-6
            assert far <= allowed, f"{name}, {key}: off by {far:.2g}"


def one_process(name):
    found, start = values(trained_odd(name, ranks=1)), dict(odd_model().named_parameters())
    still = {key for key, p in start.items() if torch.equal(p, found[f"{key} weight"])}
    assert still == {key for key, p in start.items() if not p.requires_grad or "spare" in key}
    return found


@pytest.mark.parametrize("names", [SAMPLE[:2], pytest.param(NAMES, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_fsdp2_of_trainer_equals_one_process(names):
    launch(2, sharded_equal_one_process, {name: one_process(name) for name in names})


# ---- ranks that were meant to train together -----------------------------------------------------------------------


def test_ranks_that_would_train_alone_are_stopped(monkeypatch):
    args = tiny.arguments(optim="adamw")  # connected to nobody: what accelerate makes of two ranks without a GPU
    monkeypatch.setenv("WORLD_SIZE", "2")
    resolve = hf_optim.LossAwareTrainer.get_optimizer_cls_and_kwargs
    resolve(args, None)  # a cluster may set it for single processes, too
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="2 processes were launched, but each would train alone.*`--use_cpu`"):
        resolve(args, None)


def fsdp_without_gpus(options):
    as_launched()
    heard = []
    layout.logger.warning = heard.append
    tiny.trainer(optim="adamw", ddp_backend="gloo", **options).create_optimizer()
    assert any("leaves FSDP out on CPUs" in text for text in heard) == bool(options)


@pytest.mark.parametrize("options", [{}, {"fsdp": True, "fsdp_config": {"version": 2}}], ids=["ddp", "fsdp"])
def test_fsdp_that_accelerate_leaves_out_is_told(options):
    launch(2, fsdp_without_gpus, options)


# ---- as users launch them ------------------------------------------------------------------------------------------

LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


def finetune_clm(folder, launcher=(), accumulation=1):
    """Weights and step sizes of three steps of the script, in processes of its own."""
    small = {"max_train_samples": 32, "max_eval_samples": 8, "block_size": 16, "per_device_train_batch_size": 2}
    run = {"optim": "adalo", "optim_args": "mode=compliant,kappa=1.0,backend=loop", "max_steps": 3, "logging_steps": 1}
    options = {**small, **run, "gradient_accumulation_steps": accumulation, "output_dir": folder, "report_to": "none"}
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    module = ["-m", *launcher] if launcher else []
    result = subprocess.run(
        [sys.executable, *module, SCRIPTS / "finetune_clm.py", *flags, "--do_train", "--do_eval", "--use_cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    sizes = [entry["optim/effective_lr"] for entry in logs if "optim/effective_lr" in entry]
    assert len(sizes) == 3
    return load_file(folder / "model.safetensors"), sizes


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_scripts_equal_one_process(launcher, tmp_path):
    weights, sizes = finetune_clm(tmp_path / "two", LAUNCHERS[launcher])
    expected, expected_sizes = finetune_clm(tmp_path / "one", accumulation=2)
    assert sizes == expected_sizes and weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
