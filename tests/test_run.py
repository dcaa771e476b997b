# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The runner starts scripts that know nothing of this package."""

import subprocess
import sys
from pathlib import Path

import pytest


TESTS = str(Path(__file__).parent)

# a stock script: HfArgumentParser, TrainingArguments, Trainer; nothing of ours
SCRIPT = f"""
import json, sys
assert __name__ == "__main__" and sys.argv[0].endswith("train.py")
sys.path.append({TESTS!r})
from transformers import HfArgumentParser, Trainer, TrainingArguments
assert "hf_optim" not in globals()
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
import tiny
class Mine(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()
trainer = (Mine if "own" in args.output_dir else Trainer)(tiny.model(), args, train_dataset=tiny.data())
trainer.train()
inner = trainer.optimizer
while hasattr(inner, "optimizer"):
    inner = inner.optimizer
sizes = [e["optim/effective_lr"] for e in trainer.state.log_history if "optim/effective_lr" in e]
print(json.dumps([type(inner).__module__, sizes]))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def start(script, *words, command=("-m", "hf_optim.run"), out="out", env=None):
    common = [str(script), "--output_dir", str(script.parent / out), "--max_steps", "3", "--use_cpu", "--report_to",
              "none", "--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true"]  # fmt: skip
    done = subprocess.run([sys.executable, *command, *common, *words], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("out", ["stock", "own_training_step"])
def test_loss_reaches_a_stock_trainer(script, out):
    code, stdout, stderr = start(script, "--optim", "adalo", "--optim_args", "mode=compliant", out=out)
    assert code == 0, stderr
    module, sizes = __import__("json").loads(stdout.splitlines()[-1])
    assert module == "hf_optim.optim.adalo" and len(sizes) == 3 and all(0.3 < size < 0.34 for size in sizes)


def test_through_accelerate_launch(script):
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "hf_optim.run")
    code, stdout, stderr = start(script, "--optim", "sm3", "--learning_rate", "0.1", command=launch)
    assert code == 0, stderr
    assert "hf_optim.optim.sm3" in stdout


def test_replacing_by_environment(script, monkeypatch):
    import os

    code, stdout, stderr = start(script, "--optim", "adafactor", env={**os.environ, "HF_OPTIM_REPLACE": "adafactor"})
    assert code == 0, stderr
    assert "hf_optim.optim.adafactor" in stdout


def test_the_last_line_says_which_name_was_meant(script):
    code, _, stderr = start(script, "--optim", "adalow")
    assert code == 2 and "did you mean 'adalo'" in stderr.strip().splitlines()[-1]


def test_optim_of_a_script_without_trainer_is_its_own_affair(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    command = [sys.executable, "-m", "hf_optim.run", own, "--optim", "adam"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, "['--optim', 'adam']", "")


def test_exceptions_of_the_script_are_those_of_python(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import errno; raise OSError(errno.EPIPE, 'mine')")
    command = [sys.executable, "-m", "hf_optim.cli.main", "run", script]  # through typer, which hides some
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "mine" in done.stderr.splitlines()[-1]
    assert "typer" not in done.stderr


def test_module_and_exit_code():
    code = subprocess.run(
        [sys.executable, "-m", "hf_optim.run", "-m", "this_module_is_not_there"], capture_output=True
    )
    assert code.returncode == 1 and b"No module named" in code.stderr
