# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Trains the same small Llama with fp32 weights and with bf16 weights that are rounded in three ways, and with state in
fp32, bf16 and int8.

    python scripts/compare_precision.py             # table, precision.json, precision.png; 3 minutes an arm on a core
    python scripts/compare_precision.py --jobs 2    # two runs at a time

The job is that of finetune_clm.py: Shakespeare, a new model, real Trainer arguments. A bf16 model starts from the
rounded weights of the fp32 model with the same seed and sees the same batches, so runs are compared seed by seed. The
learning rate falls to 0, and with it the updates fall below half the spacing of bf16 numbers, where rounding to
nearest drops them. (AdaLo takes its step from the loss, the learning rate plays no part.)
"""

import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import datasets
import numpy as np
import torch
import transformers
import typer
from compare_optimizers import STYLES
from finetune_clm import DataTrainingArguments, ModelArguments, build_trainer
from matplotlib.figure import Figure
from measure import environment, state_bytes
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser, PrinterCallback, TrainingArguments

import hf_optim


RESULTS = Path(__file__).resolve().parent / "results"
EVERY = 10  # steps whose mean loss Trainer logs
LAST = 50  # steps that the final training loss is the mean of
JOB = {
    "block_size": 64,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "logging_steps": EVERY,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


class Arm(NamedTuple):
    """One way to train; `rule` names the arms that share their fp32 run."""

    rule: str
    optim: str
    dtype: str
    settings: str = ""


ROUNDINGS = [f"precision={rounding}" for rounding in ("nearest", "stochastic", "kahan")]
ADALO = "mode=compliant,kappa=1.0"  # as in configs/train/clm_adalo.yaml
ARMS = [
    Arm("adamw", "adamw", "float32"),
    Arm("adamw", "adamw_torch_fused", "bfloat16"),  # what Trainer does today: the moments are bf16, too
    *(Arm("adamw", "adamw", "bfloat16", settings) for settings in ROUNDINGS),
    Arm("adamw", "adamw", "bfloat16", "precision=stochastic,state_dtype=bfloat16"),
    Arm("adamw", "adamw", "bfloat16", "precision=stochastic,state_dtype=int8"),
    Arm("adafactor_corrected", "adafactor_corrected", "float32"),
    *(Arm("adafactor_corrected", "adafactor_corrected", "bfloat16", settings) for settings in ROUNDINGS),
    Arm("adalo", "adalo", "float32", ADALO),
    Arm("adalo", "adalo", "bfloat16", f"{ADALO},precision=stochastic,state_dtype=int8"),
    Arm("muon", "muon", "float32"),
    Arm("muon", "muon", "bfloat16", "precision=stochastic,state_dtype=int8"),
]


def quiet() -> None:
    """In every process: one thread, no bars."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    hf_optim.register()


def run(arm: Arm, seed: int, steps: int) -> dict:
    """One training run: the logged losses, the final ones, and what weights and state take."""
    ours = arm.optim in hf_optim.list_optimizers()
    settings = [arm.settings, "backend=loop" if ours else ""]  # compiling takes longer than it would save
    config = {**JOB, "dtype": arm.dtype, "optim": arm.optim, "seed": seed, "max_steps": steps}
    config["optim_args"] = ",".join(filter(None, settings)) or None
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(*parser.parse_dict({**config, "output_dir": folder}))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters()) + state_bytes(trainer.optimizer)
    return {
        "seed": seed,
        "train_loss": statistics.fmean(losses[-LAST // EVERY :]),
        "eval_loss": eval_loss,
        "bytes_per_parameter": size / trainer.model.num_parameters(),
        "losses": losses,
    }


def run_all(arm: Arm, seeds: int, steps: int) -> list[dict]:
    return [run(arm, seed, steps) for seed in range(1, seeds + 1)]


def spread(values: list[float]) -> dict:
    """Mean and standard deviation over seeds; one seed has none."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def summary(runs: dict[Arm, list[dict]]) -> list[dict]:
    """Every arm with its figures, and how far it is from the fp32 run of the same seed."""
    rows = []
    for arm, own in runs.items():
        (fp32,) = (other for a, other in runs.items() if a.rule == arm.rule and a.dtype == "float32")
        row = {**arm._asdict(), "bytes_per_parameter": own[0]["bytes_per_parameter"]}
        for key in ("train_loss", "eval_loss"):
            row[key] = spread([r[key] for r in own])
            row[f"{key}_minus_fp32"] = spread([r[key] - f[key] for r, f in zip(own, fp32, strict=True)])
        rows.append({**row, "runs": own})
    return rows


def figures(of: dict) -> str:
    return f"{of['mean']:.4f}" + ("" if of["sd"] is None else f"\n± {of['sd']:.4f}")


def result_table(record: dict) -> Table:
    table = Table(
        title="A small Llama on Shakespeare",
        caption=f"Mean ± standard deviation over {record['seeds']} seeds; {record['steps']} steps.\n"
        f"Training loss: the last {LAST} steps. Minus fp32: evaluation loss, seed by seed.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for name in ("optimizer", "weights"):
        table.add_column(name, no_wrap=True)
    for name in ("B per\nparam", "training\nloss", "eval\nloss", "minus\nfp32"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in record["arms"]:
        losses = [figures(arm[key]) for key in ("train_loss", "eval_loss", "eval_loss_minus_fp32")]
        weights = "\n".join(filter(None, [arm["dtype"], *arm["settings"].split(",")]))
        table.add_row(arm["optim"], weights, f"{arm['bytes_per_parameter']:.2f}", *losses)
    return table


def loss_curves(record: dict) -> Figure:
    """Training loss minus that of fp32 over steps: the mean over seeds as a line, single seeds faint."""
    rules = list(dict.fromkeys(arm["rule"] for arm in record["arms"]))
    columns = min(2, len(rules))
    lines = -(-len(rules) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.5 * lines), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, rule in zip(panels, rules, strict=True):
        own = [arm for arm in record["arms"] if arm["rule"] == rule]
        fp32 = np.array([r["losses"] for r in own[0]["runs"]])
        steps = EVERY * np.arange(1, fp32.shape[1] + 1)
        axes.axhline(0, color="black", linewidth=1)
        for i, arm in enumerate(own[1:]):
            color, dashes = STYLES[i % len(STYLES)]
            difference = np.array([r["losses"] for r in arm["runs"]]) - fp32
            axes.plot(steps, difference.T, color=color, alpha=0.2, linewidth=0.8)
            width = 2 if i < len(STYLES) else 4  # from the fifth arm on: the first styles again, bolder
            label = " ".join(filter(None, [arm["optim"], arm["settings"].replace(",", ", ")]))
            axes.plot(steps, difference.mean(axis=0), dashes, color=color, linewidth=width, label=label)
        axes.set_title(f"{rule}, bf16 weights", fontsize=11)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.supylabel(f"training loss minus that with fp32 weights (nats per token, mean of {EVERY} steps)", size=11)
    return figure


def main(
    steps: Annotated[int, typer.Option(min=EVERY, help="Optimizer steps of a run.")] = 500,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm: seeds 1, 2, ...")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each.")] = 1,
    output_dir: Annotated[Path, typer.Option(help="For precision.json and precision.png.")] = RESULTS,
) -> None:
    """Final loss of fp32 weights against bf16 weights rounded to nearest, stochastically, or with Kahan summation, and
    of state as one byte an entry."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=quiet, max_tasks_per_child=1) as pool:
        futures = [pool.submit(run_all, arm, seeds, steps) for arm in ARMS]
        runs = {arm: future.result() for arm, future in track(list(zip(ARMS, futures)), "arms")}
    torch.set_num_threads(1)  # as in the processes: `environment` says so
    record = {**environment(torch.device("cpu")), "seeds": seeds, "steps": steps, "job": JOB, "arms": summary(runs)}
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "precision.json").write_text(json.dumps(record, indent=1) + "\n")
    loss_curves(record).savefig(output_dir / "precision.png")
    Console().print(result_table(record))


if __name__ == "__main__":
    typer.run(main)
