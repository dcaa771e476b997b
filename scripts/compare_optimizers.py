# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Fine-tunes the same model on the same data with four optimizers and shows what each one reaches and costs.

    python scripts/compare_optimizers.py              # a table, results.json and loss_curves.png; 3 minutes on 2 cores
    python scripts/compare_optimizers.py --search     # how the settings in configs/train were found; 20 minutes
"""

import argparse
import json
import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import transformers
import yaml
from finetune_classification import DATA, DataTrainingArguments, ModelArguments, build_trainer
from matplotlib.figure import Figure
from measure import environment, machine, now, state_bytes
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, TrainingArguments

import hf_optim


ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "train"

# What all runs share. `--search` writes it into every configs/train/classification_*.yaml, with the best setting.
SHARED = {
    "max_seq_length": 32,
    "max_steps": 100,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "seed": 42,
    "do_train": True,
    "do_eval": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
}
# What `--search` tries: six settings for each optimizer. AdaLo takes its step size from the loss, not from
# `learning_rate`, so there the choice is which way the loss acts (`mode`) and how strongly (`kappa`). `backend=loop`:
# compiling takes longer (20 to 50 s on two cores) than a hundred compiled steps save.
LOOP = {"optim_args": "backend=loop"}
SETTINGS = {
    "adamw_torch": [{"learning_rate": lr} for lr in (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)],
    "adalo": [
        {"optim_args": f"mode={mode},kappa={kappa},backend=loop"}
        for mode, kappas in (("adversarial", (0.01, 0.03, 0.1)), ("compliant", (0.3, 1.0, 3.0)))
        for kappa in kappas
    ],
    "adafactor_corrected": [{"learning_rate": lr, **LOOP} for lr in (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)],
    "smmf": [{"learning_rate": lr, **LOOP} for lr in (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)],
}
TUNED = ("learning_rate", "optim_args")
HELD_OUT = 600  # the last training rows: settings are judged on them, so the reported validation rows stay unseen

# Okabe and Ito's colours can be told apart with any colour vision, the dashes also in grey.
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":")]
SMOOTHING = 10  # steps


class Recorder(ProgressCallback):
    """A progress bar that shows the loss instead of printing a line per step; keeps losses and step times."""

    def __init__(self):
        super().__init__()
        self.losses, self.step_seconds = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.training_bar.set_postfix(loss=f"{self.losses[-1]:.3f}")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.started = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.step_seconds.append(now() - self.started)


def run(config: dict) -> dict:
    """Runs finetune_classification.py once and returns what the table and the plot show."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    trainer = build_trainer(*parser.parse_dict(config))
    recorder = Recorder()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(recorder)
    train_metrics = trainer.train().metrics
    eval_metrics = trainer.evaluate()
    return {
        "optim": config["optim"],
        "hyperparameters": {key: config[key] for key in TUNED if key in config},
        "accuracy": eval_metrics["eval_accuracy"],
        "eval_loss": eval_metrics["eval_loss"],
        "eval_rows": len(trainer.eval_dataset),
        "parameters": trainer.model.num_parameters(),
        "state_bytes": state_bytes(trainer.optimizer),
        # The median: a compiled optimizer spends its first steps compiling.
        "optimizer_step_seconds": float(np.median(recorder.step_seconds)),
        "train_seconds": train_metrics["train_runtime"],
        "losses": recorder.losses,
    }


def result_table(results: list[dict]) -> Table:
    rows = results[0]["eval_rows"]
    error = max((r["accuracy"] * (1 - r["accuracy"]) / rows) ** 0.5 for r in results)
    table = Table(
        title="Fine-tuning MiniLM on WordNet topics",
        caption=f"One seed. The standard error of an accuracy on {rows:,} texts is {100 * error:.1f} points.\n"
        "ms per step: the optimizer alone, median; s in all: the training run.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # this and the next two lines: to fit 80 columns
        pad_edge=False,
        show_edge=False,
    )
    for name in ("optimizer", "settings"):
        table.add_column(name, no_wrap=True)
    for name in ("eval\nacc.", "eval\nloss", "MB of\nstate", "B per\nparam", "ms per\nstep", "s in\nall"):
        table.add_column(name, justify="right")
    for r in results:
        settings = [f"lr={v}" if key == "learning_rate" else v for key, v in r["hyperparameters"].items()]
        table.add_row(
            r["optim"],
            "\n".join(settings).replace(",", "\n"),
            f"{r['accuracy']:.1%}",
            f"{r['eval_loss']:.3f}",
            f"{r['state_bytes'] / 1e6:.1f}",
            f"{r['state_bytes'] / r['parameters']:.3f}",
            f"{1e3 * r['optimizer_step_seconds']:.1f}",
            f"{r['train_seconds']:.0f}",
        )
    return table


def loss_curves(results: list[dict]) -> Figure:
    """Training loss over steps: the mean of ten steps as a line, the single steps as faint points."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for r, (color, dashes) in zip(results, STYLES, strict=True):
        steps = np.arange(1, len(r["losses"]) + 1)
        smooth = pd.Series(r["losses"]).rolling(SMOOTHING, min_periods=1, center=True).mean()
        state = r["state_bytes"] / r["parameters"]
        label = f"{r['optim']}: accuracy {r['accuracy']:.1%}, state {state:.2f} bytes per parameter"
        axes.plot(steps, r["losses"], ".", color=color, alpha=0.2, markersize=4)
        axes.plot(steps, smooth, dashes, color=color, linewidth=2, label=label)
    size = results[0]["parameters"] / 1e6
    batch = SHARED["per_device_train_batch_size"]
    axes.set_title(
        f"MiniLM ({size:.1f} M parameters) on WordNet topics, {batch} texts per step\n{machine()}", fontsize=11
    )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training loss (nats per text; line: mean of {SMOOTHING} steps)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def compare(output_dir: Path, console: Console) -> list[dict]:
    """Runs every optimizer with the settings of its file under configs/train."""
    results = []
    for optim in SETTINGS:
        config = yaml.safe_load((CONFIGS / f"classification_{optim}.yaml").read_text())
        console.rule(optim)
        results.append(run({**config, "output_dir": str(output_dir / optim)}))
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").write_text(json.dumps({**environment(), "results": results}, indent=1))
    loss_curves(results).savefig(output_dir / "loss_curves.png")
    return results


def search(output_dir: Path, console: Console):
    """Tries all settings, notes them in configs/train/search.json and writes the best ones into the YAML files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(DATA / "train.csv")
    files = {"train_file": str(output_dir / "train.csv"), "validation_file": str(output_dir / "held_out.csv")}
    rows[:-HELD_OUT].to_csv(files["train_file"], index=False)
    rows[-HELD_OUT:].to_csv(files["validation_file"], index=False)

    record = {**environment(), "held_out_rows": HELD_OUT, "chosen_by": "eval_loss", "shared": SHARED, "runs": {}}
    for optim, settings in SETTINGS.items():
        runs = record["runs"][optim] = []
        for setting in settings:
            console.rule(f"{optim} {setting}")
            result = run({**SHARED, **files, "optim": optim, **setting, "output_dir": str(output_dir / optim)})
            runs.append({**setting, "eval_loss": result["eval_loss"], "accuracy": result["accuracy"]})
            console.print(runs[-1])
        best = min(runs, key=lambda r: r["eval_loss"])
        config = {**SHARED, "optim": optim, **{key: best[key] for key in TUNED if key in best}}
        config["output_dir"] = f"outputs/classification_{optim}"
        (CONFIGS / f"classification_{optim}.yaml").write_text(
            "# Written by `python scripts/compare_optimizers.py --search`; search.json has what else it tried.\n"
            + yaml.safe_dump(config, sort_keys=False)
        )
    (CONFIGS / "search.json").write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Compares four optimizers on one fine-tuning job.")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "compare_optimizers", help="for results")
    parser.add_argument("--search", action="store_true", help="search the settings and rewrite configs/train")
    args = parser.parse_args()

    # Only the training bars and the table are for the reader.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    hf_optim.register()
    console = Console()
    if args.search:
        search(args.output_dir / "search", console)
        return
    results = compare(args.output_dir, console)
    console.print(result_table(results))
    console.print(f"Wrote {os.path.relpath(args.output_dir / 'results.json')} and loss_curves.png next to it.")


if __name__ == "__main__":
    main()
