# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Counts what test runs have shown, subject by subject: `scripts/results/tests.json`, a table of the README.

    pytest -n 2 --junitxml=ordinary.xml             # 12 minutes on two cores
    pytest -n 2 -m slow --junitxml=slow.xml         # two hours; parts of it do, each with a report of its own
    python scripts/count_tests.py ordinary.xml slow.xml

A test that failed in one report and passed in a later one counts as passed.
"""

import json
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import typer
from make_table import TESTS, tests
from measure import environment
from rich.console import Console
from rich.markdown import Markdown


SUBJECTS = {  # what the README says of it, and the files of tests/ that show it
    "steps in fp32, fp64, bf16 and fp16 equal the float64 oracle of the paper, alone and with flags": ("oracles",),
    "fp32, autocast, bf16 weights, fp16 with GradScaler; skipped steps leave no trace; NaN, inf, 1e-38 to 1e38": (
        "mixed_precision",
        "loss",
    ),
    "DDP: replicas bit-identical, accumulation = more processes, FSDP2 through Trainer, launched scripts": ("ranks",),
    "FSDP2: even and uneven shards, fewer rows than ranks, tied, frozen, no gradient; collectives": (
        "sharding",
        "sharded_code",
    ),
    "DeepSpeed ZeRO equals DDP, or is refused": ("deepspeed", "verdicts"),
    "resume after `kill -9` bit for bit; damaged checkpoints are refused or replaced": ("resume",),
    "kept checkpoints of every optimizer load bit for bit": ("golden",),
    "generic checks of every optimizer: state_dict, pickle, hooks, closures, layouts, ...": (
        "conformance",
        "conformance_more",
        "options",
        "precision",
        "hazards",
        "hazards_adam",
        "hazards_flags",
    ),
    "compiled steps equal the loop": ("compile",),
    "gradient release equals a step at the end": ("release",),
    "flags in twos and threes: refused, or loop = compiled; fifty steps beside implementations of others": (
        "composition",
        "differential",
        "convert",
    ),
    "state in int8; predicted memory is that of real runs": ("int8", "memory"),
    "400 bad values for every optimizer, 1,000 `--optim_args`, 5,000 shapes, strides and dtypes": ("bad_input",),
    "faults planted into the code, each caught by the suite": ("faults",),
    "peft, TRL, Seq2SeqTrainer, checkpointing, compiled models, plain accelerate loops": ("neighbours", "trainer"),
    "scripts, recipes, command line, runner, registry, losses, callbacks": (
        "scripts",
        "benchmarks",
        "cli",
        "run",
        "registry",
        "architecture",
        "losses",
        "metrics",
        "tails",
    ),
}


def main(reports: Annotated[list[Path], typer.Argument(help="JUnit XML files of pytest, older ones first.")]) -> None:
    """Count passed, failed and skipped tests of pytest's reports."""
    outcomes: dict[str, dict[str, str]] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            found = {child.tag for child in case} & {"failure", "error", "skipped"}
            file = case.get("classname", "").split(".")[-1].removeprefix("test_")
            outcomes.setdefault(file, {})[case.get("name", "")] = found.pop() if found else "passed"
    rows = []
    for subject, files in SUBJECTS.items():
        of = [outcome for file in files for outcome in outcomes.get(file, {}).values()]
        counts = {key: of.count(key) for key in ("passed", "skipped")}
        rows.append({"subject": subject, "files": files, **counts, "failed": len(of) - sum(counts.values())})
    TESTS.write_text(json.dumps({**environment(), "subjects": rows}, indent=1) + "\n")
    Console().print(Markdown(tests()))


if __name__ == "__main__":
    typer.run(main)
