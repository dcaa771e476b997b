# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, where errors go, exit codes."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import hf_optim
from hf_optim.cli.main import app


def cli(*words):
    """(exit code, stdout, stderr) of a real process."""
    done = subprocess.run([sys.executable, "-m", "hf_optim.cli.main", *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def printed(*words):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", [(), ("list",), ("show",), ("check",), ("memory",), ("env",)])
def test_help_renders(command):
    assert "Usage" in printed(*command, "--help")


def test_list_shows_every_name():
    output = printed("list")
    assert all(name in output for name in hf_optim.list_optimizers())
    assert [entry["name"] for entry in json.loads(printed("list", "ad*", "--json"))] == hf_optim.list_optimizers("ad*")


def test_show_tells_everything(name):
    info, output = hf_optim.info(name), printed("show", name)
    assert info.link in output and f"{info.bytes_per_parameter:.3g} bytes per parameter" in output
    assert all(option in output for option in info.options) and all(flag in output for flag in info.flags)
    papers = [word for t in info.techniques for word in t.__doc__.split() if word.startswith("https://")]
    assert all(paper in output for paper in papers) and bool(papers) == bool(set(info.preset) & set(info.flags))
    facts = json.loads(printed("show", name, "--json"))
    assert {o["name"]: o["default"] for o in facts["options"]} == info.defaults
    assert facts["needs_loss"] is info.needs_loss and set(facts["distributed"]) == {"ddp", "fsdp2", "fsdp1", "zero"}


def test_env_names_versions():
    import torch
    import transformers

    facts = json.loads(printed("env", "--json"))
    assert facts["torch"] == torch.__version__ and facts["transformers"] == transformers.__version__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "adallo"), "did you mean 'adalo'"),
        (("list", "zz*"), "no optimizer matches 'zz*'"),
        pytest.param(("show",), "Missing argument", marks=pytest.mark.slow),
        pytest.param(("frobnicate",), "No such command", marks=pytest.mark.slow),
        (("memory", "/nowhere", "--optim", "sm3"), "no config of transformers at '/nowhere'"),
        (("run", "/nowhere/train.py"), "no such script: /nowhere/train.py"),
        pytest.param(("run",), "hf-optim run SCRIPT", marks=pytest.mark.slow),
    ],
)
def test_mistakes_go_to_stderr_with_exit_code_2(words, message):
    code, out, err = cli(*words)
    assert code == 2 and not out and message in err and "Traceback" not in err


def test_run_help_is_its_own():
    code, out, _ = cli("run", "--help")
    assert code == 0 and "accelerate launch" in out
