# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A run that was killed goes on as if nothing had happened, on one process and on several; damage is never silent."""

import os
import shutil
import signal
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import transformers
from conftest import LAYOUTS, slow_but
from engine import frozen, rich
from packaging.version import Version
from ranks import as_launched, launch, shard_on_cpu
from safetensors.torch import load_file
from test_sharding import make_model, sharded_model, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

import hf_optim
from hf_optim.trainer import resume
from hf_optim.trainer.loss import innermost


NAMES = hf_optim.list_optimizers()
# 40 rows in batches of 8, two to a step: five batches and three steps an epoch; checkpoints at 2, 4 and 6
RUN = {"max_steps": 8, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
POINTS = {  # event and step at which the process dies, and the checkpoint that is left
    "in a step": ("on_pre_optimizer_step", 5, 4),
    "in an accumulation window": ("on_substep_end", 4, 4),
    "across an epoch": ("on_pre_optimizer_step", 3, 2),
}


pytestmark = pytest.mark.usefixtures("forking_trainers")


def make(name, folder, bf16=False, autocast=False, cls=None, **options):
    net = tiny.model(dropout=0.1)
    fixed = {"optim": name, "bf16": autocast, "per_device_train_batch_size": 8}
    args = tiny.arguments(**{**RUN, **fixed, **options})
    args.output_dir = str(folder)
    return (cls or hf_optim.LossAwareTrainer)(net.bfloat16() if bf16 else net, args, train_dataset=tiny.data(40))


def result(run):
    """Weights, state, groups, scheduler and logs of a run, frozen; of a sharded one this rank's part."""
    parts = {
        "weights": [p.to_local() if isinstance(p, DTensor) else p for p in run.model.parameters()],
        "optimizer": innermost(run.optimizer).state_dict(),
        "scheduler": run.lr_scheduler.state_dict(),
    }
    for state in parts["optimizer"]["state"].values():
        state.update({k: v.to_local() for k, v in state.items() if isinstance(v, DTensor)})
    keys = ("loss", "grad_norm", "learning_rate", "optim/effective_lr")
    return {**frozen(parts), "logs": [[e.get(k) for k in keys] for e in run.state.log_history if "loss" in e]}


def same(found, wanted):
    different = [key for key in wanted if found[key] != wanted[key]]
    assert not different and len(found["logs"]) == RUN["max_steps"], different


class Kill(TrainerCallback):
    """SIGKILL to its own process, where nothing can be cleaned up."""

    def __init__(self, event, step):
        def strike(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, event, strike)


def train_until_killed(made, event, step):
    run = made()
    run.add_callback(Kill(event, step))
    run.train()


def in_a_child(fn, *args):
    """Run in a forked process. Returns its exit code."""
    method = "spawn" if torch.cuda.is_available() else "fork"  # a CUDA context does not survive a fork
    child = mp.get_context(method).Process(target=fn, args=args)
    child.start()
    child.join()
    return child.exitcode


# ---- kill -9 -------------------------------------------------------------------------------------------------------


def resumes_after_kills(name, points, folder, **options):
    whole = make(name, folder / "whole", **options)
    whole.train()
    wanted = result(whole)
    for point in points:
        event, step, left = POINTS[point]
        made = partial(make, name, folder / point, **options)
        assert in_a_child(train_until_killed, made, event, step) == -signal.SIGKILL
        assert resume.checkpoints_in(folder / point)[0] == f"checkpoint-{left}"
        again = made()
        again.train(resume_from_checkpoint=True)
        same(result(again), wanted)


@pytest.mark.parametrize("which", LAYOUTS)
def test_killed_run_goes_on_bit_for_bit(which, tmp_path):
    point = list(POINTS)[LAYOUTS.index(which) % len(POINTS)]
    resumes_after_kills(which, [point], tmp_path, bf16=True)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16-weights"])
@pytest.mark.parametrize("which", NAMES)
def test_killed_run_goes_on_wherever_it_was_killed(which, bf16, tmp_path):
    resumes_after_kills(which, POINTS, tmp_path, bf16=bf16)


@pytest.mark.parametrize("which", [LAYOUTS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS[1:])])
def test_killed_run_in_autocast(which, tmp_path):
    resumes_after_kills(which, ["in an accumulation window"], tmp_path, autocast=True)


def distributed_run(kind, name, folder, point=None, resumed=False):
    as_launched()
    options = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    if kind != "ddp":
        shard_on_cpu()
        layers = {"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        options |= {"fsdp": True, "fsdp_config": layers}
    run = make(name, folder, **options)
    if point:
        run.add_callback(Kill(*POINTS[point][:2]))
    run.train(resume_from_checkpoint=resumed)
    assert isinstance(next(run.model.parameters()), DTensor) == (kind != "ddp")
    torch.save(result(run), f"{folder}/result{dist.get_rank()}")


def ranks_resume(kind, name, point, folder):
    folder.joinpath("whole").mkdir(), folder.joinpath("killed").mkdir()
    launch(2, distributed_run, kind, name, folder / "whole")
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        launch(2, distributed_run, kind, name, folder / "killed", point)
    assert resume.checkpoints_in(folder / "killed")[0] == f"checkpoint-{POINTS[point][2]}"
    launch(2, distributed_run, kind, name, folder / "killed", None, True)
    for rank in range(2):
        found, wanted = (torch.load(folder / which / f"result{rank}") for which in ("killed", "whole"))
        same({**found, "logs": wanted["logs"]}, wanted)  # only the first rank logs
        assert rank or found["logs"] == wanted["logs"]


DISTRIBUTED = [
    pytest.param(kind, name, marks=() if name == "adalo" and kind != "FULL_STATE_DICT" else pytest.mark.slow)
    for kind in ("ddp", "SHARDED_STATE_DICT", "FULL_STATE_DICT")
    for name in (LAYOUTS if kind != "FULL_STATE_DICT" else LAYOUTS[:3])
]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="5.2 resumes several CPU ranks with an error (DDP) or other random numbers (FSDP), adamw_torch too",
)
@pytest.mark.parametrize("kind, which", DISTRIBUTED)
def test_killed_ranks_go_on_bit_for_bit(kind, which, tmp_path):
    point = list(POINTS)[LAYOUTS.index(which) % len(POINTS)]
    ranks_resume(kind, which, point, tmp_path)


# ---- other numbers of ranks ----------------------------------------------------------------------------------------


def state_of(model, optimizer, how=None):
    options = StateDictOptions(full_state_dict=how == "full", flatten_optimizer_state_dict=how == "flat")
    return get_optimizer_state_dict(model, optimizer, options=options), options


def whole_state(model, optimizer):
    """Weights and state by parameter, and the group without its parameters; frozen, on every rank."""
    full = lambda x: x.full_tensor() if isinstance(x, DTensor) else x  # noqa: E731
    states = [optimizer.state[p] for p in model.parameters()]
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    weights = [full(p.detach()) for p in model.parameters()]
    return weights, frozen([[{k: full(v) for k, v in s.items()} for s in states], group])


def fresh(name, seed=0):
    # on one rank plain parameters; one group: flattened names of several groups are torch's affair
    model = sharded_model(seed) if dist.get_world_size() > 1 else make_model(seed)
    return model, hf_optim.create(name, list(model.parameters()), **rich(name), **({} if seed else {"lr": 0.01}))


def save_on_these_ranks(name, folder):
    model, optimizer = fresh(name)
    train(model, optimizer, 1, 2)
    for how in ("sharded", "flat"):
        dcp.save({"optim": state_of(model, optimizer, how)[0]}, checkpoint_id=f"{folder}/{how}")
    full = state_of(model, optimizer, "full")[0]
    if dist.get_rank() == 0:  # now: what is replicated is not copied into it
        torch.save(full, f"{folder}/optimizer.pt")
    saved = [[w.clone() for w in whole_state(model, optimizer)[0]], whole_state(model, optimizer)[1]]
    train(model, optimizer, 3, 2)
    after = whole_state(model, optimizer)[0]
    if dist.get_rank() == 0:
        torch.save([saved, after], f"{folder}/expected")


def load_on_these_ranks(name, folder):
    (weights, state), after = torch.load(f"{folder}/expected")
    for how in ("sharded", "flat", "full"):
        model, optimizer = fresh(name, seed=1)
        given, options = state_of(model, optimizer, how)
        if how == "full":
            given = torch.load(f"{folder}/optimizer.pt", weights_only=True)
        else:
            box = {"optim": given}
            dcp.load(box, checkpoint_id=f"{folder}/{how}")
            given = box["optim"]
        set_optimizer_state_dict(model, optimizer, given, options=options)
        assert whole_state(model, optimizer)[1] == state, how
        place_weights(model, weights)
        train(model, optimizer, 3, 2)
        for p, q in zip(whole_state(model, optimizer)[0], after):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-6, msg=f"{how}: {{}}".format)


def place_weights(model, weights):
    for p, w in zip(model.parameters(), weights):
        with torch.no_grad():
            p.copy_(torch.distributed.tensor.distribute_tensor(w, p.device_mesh, p.placements)
                    if isinstance(p, DTensor) else w)  # fmt: skip


@pytest.mark.parametrize("which", slow_but("adalo", "adafactor_corrected"))
def test_checkpoint_of_two_ranks_loads_on_one_and_three(which, tmp_path):
    launch(2, save_on_these_ranks, which, str(tmp_path))
    for world in (1, 3):
        launch(world, load_on_these_ranks, which, str(tmp_path))


# ---- damaged checkpoints -------------------------------------------------------------------------------------------

UNREAD = {"training_args.bin", "generation_config.json"}  # nothing on resuming looks at them
FILES = (  # in the order in which Trainer writes them
    "config.json", "generation_config.json", "model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "trainer_state.json",
)  # fmt: skip
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with checkpoints 2, 4, 6, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    run = make("adalo", folder)
    run.train()
    shutil.rmtree(folder / "checkpoint-8")
    return folder, result(run)


@pytest.fixture
def output(finished, tmp_path):
    """A copy of its output folder."""
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def go_on(output, wanted, checkpoint=True):
    run = make("adalo", output)
    run.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    same(result(run), wanted)


def test_an_unharmed_checkpoint_is_taken_without_a_word(finished, output, caplog):
    go_on(output, finished[1])
    assert not [r for r in caplog.records if r.name.startswith("hf_optim")]
    assert {path.name for path in (output / "checkpoint-6").iterdir()} == set(FILES)


def test_files_of_others_are_not_looked_at(finished, output, caplog):
    (output / "checkpoint-6" / "ema").mkdir()
    for name in ("vocab.bin", "metrics.pt", "faiss.index.json", "ema/ema.pt", "ema/model.safetensors"):
        (output / "checkpoint-6" / name).write_bytes(b"[1]")
    go_on(output, finished[1])
    assert not [r for r in caplog.records if r.name.startswith("hf_optim")]


def test_a_trainer_may_keep_its_weights_elsewhere(finished, output):
    class Own(hf_optim.LossAwareTrainer):
        def _load_from_checkpoint(self, folder, model=None):
            self.model.load_state_dict(load_file(Path(folder) / "body" / "weights.safetensors"), strict=False)

    folder = output / "checkpoint-6"
    (folder / "body").mkdir()
    (folder / "model.safetensors").rename(folder / "body" / "weights.safetensors")
    run = make("adalo", output, cls=Own)
    run.train(resume_from_checkpoint=str(folder))
    same(result(run), finished[1])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(finished, output, caplog, damage, file):
    DAMAGES[damage](output / "checkpoint-6" / file)
    harmless = file in UNREAD or (file, damage) == ("config.json", "missing")
    if not harmless:
        with pytest.raises(ValueError, match=rf"checkpoint-6: {file} is \w+.*Resume from .*checkpoint-4, which is"):
            make("adalo", output).train(resume_from_checkpoint=str(output / "checkpoint-6"))
        assert not caplog.text
    go_on(output, finished[1])
    told = [r.getMessage() for r in caplog.records if "Resuming from" in r.getMessage()]
    assert len(told) == (not harmless)
    assert harmless or ("checkpoint-4, the last" in told[0] and f"checkpoint-6: {file} is" in told[0])


@pytest.mark.parametrize("written", range(len(FILES)))
def test_killed_while_saving(finished, output, caplog, written):
    for file in FILES[written:]:
        (output / "checkpoint-6" / file).unlink()
    go_on(output, finished[1])
    assert "checkpoint-4, the last complete checkpoint" in caplog.text
    assert "checkpoint-6: trainer_state.json is missing" in caplog.text


def killed_while_saving(output, step):
    def save(content, file, *args, **kwargs):
        write(content, file, *args, **kwargs)
        if str(file).endswith(f"checkpoint-{step}/optimizer.pt"):
            os.truncate(file, os.stat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    write, torch.save = torch.save, save
    make("adalo", output).train()


def test_killed_while_saving_over_an_older_checkpoint(finished, output, caplog):
    """The older one's last file must not make a mixture of both look complete."""
    shutil.rmtree(output / "checkpoint-2")
    assert in_a_child(killed_while_saving, output, 4) == -signal.SIGKILL
    shutil.rmtree(output / "checkpoint-6")
    assert {path.name for path in (output / "checkpoint-4").iterdir()} == set(FILES) - {"trainer_state.json"}
    go_on(output, finished[1])
    assert "checkpoint-4: trainer_state.json is missing" in caplog.text


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_flipped_bit_is_found(output, file):
    path = output / "checkpoint-6" / file
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda part: part.file_size))
    content[content.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        make("adalo", output).train(resume_from_checkpoint=str(output / "checkpoint-6"))


def test_nothing_complete_is_left(output):
    for step in (2, 4, 6):
        (output / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-6: optimizer.pt(.|\n)*checkpoint-2(.|\n)*Start without"):
        make("adalo", output).train(resume_from_checkpoint=True)


def test_nothing_is_there(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):  # Trainer's own words
        make("adalo", tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-9: trainer_state.json is missing"):
        make("adalo", tmp_path).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-9")


def test_checkpoints_with_the_weights_only_are_refused(tmp_path):
    make("adalo", tmp_path, save_only_model=True, max_steps=2).train()
    with pytest.raises(ValueError, match="optimizer.pt is missing.*`from_pretrained` for a new run"):
        make("adalo", tmp_path).train(resume_from_checkpoint=True)


def test_stock_trainer_is_silent(output):
    """Why this is here: without its optimizer a checkpoint of stock Trainer goes on with a fresh one."""
    (output / "checkpoint-6" / "optimizer.pt").unlink()
    run = make("adamw", output, cls=Trainer)
    run.train(resume_from_checkpoint=str(output / "checkpoint-6"))
    assert innermost(run.optimizer).param_groups[0]["step"] == 2


def under_the_runner(output):
    from hf_optim import run

    run.prepare()
    with pytest.raises(ValueError, match="optimizer.pt is missing"):
        make("adalo", output, cls=Trainer).train(resume_from_checkpoint=str(output / "checkpoint-6"))
    made = make("adalo", output, cls=Trainer)
    made.train(resume_from_checkpoint=True)
    assert innermost(made.optimizer).param_groups[0]["step"] == RUN["max_steps"]


def test_stock_trainer_under_the_runner_is_not(output):
    (output / "checkpoint-6" / "optimizer.pt").unlink()
    assert in_a_child(under_the_runner, output) == 0


def test_pieces_of_a_sharded_checkpoint(output):
    folder = output / "checkpoint-6" / "optimizer_0"
    dcp.save({"a": torch.arange(100.0)}, checkpoint_id=folder)
    look = lambda: next(resume.problems(make("adalo", output), output / "checkpoint-6"), "")  # noqa: E731
    assert look() == ""
    (piece,) = folder.glob("*.distcp")
    os.truncate(piece, piece.stat().st_size // 2)
    assert "optimizer_0 is damaged" in look() and "is cut off at" in look()
    piece.unlink()
    assert "optimizer_0 is damaged" in look()
    (folder / ".metadata").unlink()
    assert "optimizer_0 is damaged" in look()


def on_two_machines(output):
    """Each rank a machine with a copy of its own; that of the second one is damaged."""
    rank = dist.get_rank()
    mine = output.parent / f"machine{rank}"
    shutil.copytree(output, mine)
    if rank:
        (mine / "checkpoint-6" / "scheduler.pt").unlink()
    args = SimpleNamespace(output_dir=str(mine), local_process_index=0, process_index=rank, world_size=2)
    trainer = SimpleNamespace(args=args, is_deepspeed_enabled=False, accelerator=SimpleNamespace(scaler=None))
    assert resume.complete_checkpoint(trainer, True) == str(mine / "checkpoint-4")
    with pytest.raises(ValueError, match=rf"machine{rank}/checkpoint-6: scheduler.pt is missing"):
        resume.complete_checkpoint(trainer, str(mine / "checkpoint-6"))
    trainer.accelerator.scaler = object()  # fp16
    with pytest.raises(ValueError, match="scaler.pt is missing"):
        resume.complete_checkpoint(trainer, str(mine / "checkpoint-4"))


def test_ranks_choose_alike(output):
    launch(2, on_two_machines, output)


def test_other_numbers_of_processes_are_told(output, caplog):
    args = SimpleNamespace(output_dir=str(output), local_process_index=0, process_index=1, world_size=2)
    trainer = SimpleNamespace(args=args, is_deepspeed_enabled=False, accelerator=SimpleNamespace(scaler=None))
    assert resume.complete_checkpoint(trainer, True) == str(output / "checkpoint-6")
    assert "has no rng_state_1.pth: it was saved by another number of processes" in caplog.text
