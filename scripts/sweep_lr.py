# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Finds the learning rates with which every optimizer of hf_optim fine-tunes MiniLM in a short run.

    python scripts/sweep_lr.py                  # all names; 40 minutes on 2 cores
    python scripts/sweep_lr.py --optim lamb     # one name; the others keep their figures

Every name starts at the learning rate of its class and goes up and down in half decades until a rate no longer trains.
A rate trains if the mean loss of the last steps has come down at least a tenth as far as in the best run of all names.
A longer run makes do with less. The result, scripts/results/sweep_lr.json, is where the `learning_rate` column of the
README comes from.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
import transformers
from compare_optimizers import SHARED
from finetune_classification import DataTrainingArguments, ModelArguments, build_trainer
from measure import environment
from rich.progress import track
from transformers import HfArgumentParser, TrainingArguments, get_linear_schedule_with_warmup, set_seed

import hf_optim


RESULT = Path(__file__).resolve().parent / "results" / "sweep_lr.json"
STEPS, LAST, BATCH = 60, 20, 8
LEFT_OUT = ("adalo",)  # `lr` plays no part
SEARCH = 6  # half decades to look for the first rate that trains
SHARE = 0.1  # of the largest drop of the loss, which a rate that trains reaches


def rate(k: int) -> float:
    """The k-th half decade: 1, 3, 10, 30, ... (times a power of ten)."""
    return float(f"{10 ** (k / 2):.0e}")


class Bench:
    """A model and batches that every run starts from anew."""

    def __init__(self) -> None:
        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
        config = {**SHARED, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "optim": "adamw_torch"}
        trainer = build_trainer(*parser.parse_dict(config))
        self.model = trainer.model
        self.start = copy.deepcopy(self.model.state_dict())
        self.batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(STEPS))]
        self.model.train()
        with torch.no_grad():
            self.untrained = sum(self.model(**batch).loss.item() for batch in self.batches[-LAST:]) / LAST

    def drop(self, name: str, lr: float) -> float:
        """How far the loss on the last batches came down, in the mean over these steps."""
        set_seed(SHARED["seed"])
        self.model.load_state_dict(self.start)
        optimizer = hf_optim.create(name, self.model, lr=lr)
        schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
        losses = []
        for batch in self.batches:
            loss = self.model(**batch).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return -math.inf
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # as Trainer does
            optimizer.step(loss=loss)
            schedule.step()
            optimizer.zero_grad()
        return self.untrained - sum(losses[-LAST:]) / LAST


def same(one: str, two: str) -> bool:
    """Whether two names differ in their decay alone, which without `weight_decay` (and within these steps) is none."""
    rules = []
    for info in map(hf_optim.info, (one, two)):
        rules.append((info.cls, {k: v for k, v in info.preset.items() if k != "decay"}))
    return rules[0] == rules[1]


def sweep(bench: Bench, name: str, enough: float) -> dict[str, float]:
    """{rate: drop} from the default of the class outwards."""
    start = round(2 * math.log10(hf_optim.info(name).options["lr"].default))
    found = {start: bench.drop(name, rate(start))}
    for step in (-1, 1):
        k = start
        while found[k] >= enough or (max(found.values()) < enough and abs(k - start) < SEARCH):
            k += step
            found[k] = bench.drop(name, rate(k))
    return {f"{rate(k):g}": found[k] for k in sorted(found)}


def ranges(record: dict) -> dict[str, dict[str, float]]:
    """{name: the lowest rate that trains, the best, the highest}."""
    enough = SHARE * max(max(drops.values()) for drops in record["drops"].values())
    fine = {name: {lr: d for lr, d in drops.items() if d >= enough} for name, drops in record["drops"].items()}
    return {
        name: {"lowest": min(map(float, of)), "best": float(max(of, key=of.get)), "highest": max(map(float, of))}
        for name, of in fine.items()
        if of
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="*", help="names; all but adalo if not given")
    args = parser.parse_args()
    names = args.optim or [n for n in hf_optim.list_optimizers() if n not in LEFT_OUT]
    transformers.utils.logging.set_verbosity_error()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"drops": {}}
    bench = Bench()
    reference = max(bench.drop("adamw", rate(k)) for k in (-8, -7, -6))
    for name in track(names, "names"):
        twin = next((n for n in record["drops"] if n not in names[names.index(name) :] and same(n, name)), None)
        record["drops"][name] = record["drops"][twin] if twin else sweep(bench, name, SHARE * reference)
        record |= environment() | {"steps": STEPS, "batch": BATCH, "clip": 1.0, "share": SHARE}
        record["ranges"] = ranges(record)
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    for name, found in record["ranges"].items():
        print(f"{name:22} {found['lowest']:g} to {found['highest']:g}, best {found['best']:g}")


if __name__ == "__main__":
    main()
