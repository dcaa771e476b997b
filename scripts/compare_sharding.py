# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Asks of every optimizer at hand whether it takes the same steps on shards as on whole weights.

    python scripts/compare_sharding.py                   # 10 minutes on 2 cores
    python scripts/compare_sharding.py --filter "*ada*"  # prints these, writes nothing

Each one trains a small model for eight steps under FSDP2 (`fully_shard`) on two CPU processes, and whole in one. Some
weights have rows that the processes cannot share evenly, one has a single row, so that one process holds none of it.
An optimizer is right if no weight is off by more than 1e-5 of the largest in its tensor. The names are those of
hf_optim, of torch.optim, transformers' Adafactor, and those of pytorch_optimizer if it is installed; all with their
default options, and with `foreach=False` where the default fails. Of hf_optim's, which also join the collectives of
matrices of one shape once compiled, those are counted too, for eight. The result is scripts/results/sharding.json.
"""

import argparse
import contextlib
import fnmatch
import importlib.metadata
import inspect
import io
import json
import logging
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from measure import environment
from rich.progress import track
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import hf_optim


RESULT = Path(__file__).resolve().parent / "results" / "sharding.json"
STEPS, RANKS, TOLERANCE, SECONDS = 8, 2, 1e-5, 60
MATRICES = ((8, 6), (6, 8), (5, 4), (9, 5))
ALIKE = ((9, 5),) * 8


def candidates() -> list[tuple[str, str]]:
    """(package, name) of every optimizer at hand."""
    found = [("hf_optim", name) for name in hf_optim.list_optimizers()]
    members = inspect.getmembers(torch.optim, inspect.isclass)
    rules = [name for name, cls in members if issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"]
    found += [("torch.optim", name) for name in rules] + [("transformers", "Adafactor")]
    with contextlib.suppress(ImportError):
        import pytorch_optimizer

        found += [("pytorch_optimizer", name) for name in sorted(pytorch_optimizer.get_supported_optimizers())]
    return found


def create(package: str, name: str, params: list, **options) -> torch.optim.Optimizer:
    """The optimizer with its default options."""
    if package == "hf_optim":
        return hf_optim.create(name, params, **options)
    if package == "pytorch_optimizer":
        import pytorch_optimizer

        cls = pytorch_optimizer.load_optimizer(name)
    else:
        cls = getattr(torch.optim if package == "torch.optim" else transformers, name)
    if name == "Muon":  # torch's takes matrices only
        params = [p for p in params if p.ndim == 2]
    elif "muon" in name:  # those of pytorch_optimizer want to be told which
        params = [{"params": [p for p in params if (p.ndim == 2) == on], "use_muon": on} for on in (True, False)]
        params = [group for group in params if group["params"]]
    return cls(params, **options)


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 5), torch.nn.Linear(5, 1)
    )


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    needed = inspect.signature(optimizer.step).parameters.get("closure")
    if getattr(optimizer, "needs_loss", False):
        optimizer.step(loss=loss)
    elif needed is not None and needed.default is inspect.Parameter.empty:
        optimizer.step(lambda: loss)
    else:
        optimizer.step()


def train(package: str, name: str, model: torch.nn.Module, **options) -> list[torch.Tensor]:
    """The weights after eight steps, whole."""
    optimizer = create(package, name, list(model.parameters()), **options)
    torch.manual_seed(0)  # some draw random numbers
    for t in range(STEPS):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        step(optimizer, loss.detach())
    weights = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in weights]


def difference(whole: list[torch.Tensor], sharded: list[torch.Tensor]) -> float:
    """The largest, relative to the largest weight of its tensor."""
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in zip(whole, sharded))


def collectives(package: str, name: str, shapes: tuple, **options) -> float:
    """Collective calls of a later step, per matrix."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (RANKS,))
    place = lambda: [distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for shape in shapes]  # noqa: E731
    params = [torch.nn.Parameter(p) for p in place()]
    optimizer = create(package, name, params, **options)
    for _ in range(2):
        for p, g in zip(params, place()):
            p.grad = g
        with CommDebugMode() as mode:
            step(optimizer, torch.tensor(1.0))
    return mode.get_total_counts() / len(shapes)


def on_rank(rank: int, package: str, name: str, options: dict, folder: str) -> None:
    """Writes what it finds to a file; the first process to fail says why."""
    torch.set_num_threads(1)
    store, wait = f"file://{folder}/store", timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=wait)
    try:
        sharded = make_model()
        for layer in (0, 1, 3, 4):
            fully_shard(sharded[layer])
        whole = train(package, name, make_model(), **options)
        off = difference(whole, train(package, name, fully_shard(sharded), **options))
        found = {"difference": off, "collectives_per_matrix": collectives(package, name, MATRICES, **options)}
        if package == "hf_optim":
            found["compiled_per_matrix"] = collectives(package, name, ALIKE, backend="fused")
        if rank == 0:
            Path(folder, "found").write_text(json.dumps(found))
        dist.barrier()
    except Exception as error:  # whatever an optimizer may raise: it is the result
        with contextlib.suppress(FileExistsError), open(f"{folder}/error", "x") as file:
            file.write(first_line(error))
    os._exit(0)  # gloo's threads may abort an orderly exit


def measure(package: str, name: str, **options) -> dict:
    """One optimizer on processes of its own: what hangs or dies takes no other with it."""
    with tempfile.TemporaryDirectory() as folder:
        started = mp.start_processes(on_rank, (package, name, options, folder), RANKS, join=False, start_method="fork")
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and any(p.is_alive() for p in started.processes):
            time.sleep(0.02)
        for process in started.processes:
            process.kill()
            process.join()
        for outcome in ("error", "found"):
            path = Path(folder, outcome)
            if path.exists():
                return {"error": path.read_text()} if outcome == "error" else json.loads(path.read_text())
    return {"error": f"the processes wait for each other, or died, within {SECONDS} s"}


def first_line(error: Exception) -> str:
    """Its type and the first line of what it says, or else where it came from."""
    place = f"in {traceback.extract_tb(error.__traceback__)[-1].name}()"
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), place)}"


def compare(package: str, name: str) -> dict:
    """The row of one optimizer."""
    row: dict = {"package": package, "name": name}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            weights = train(package, name, make_model())
    except Exception as error:  # it wants more than parameters, or second derivatives
        return row | {"unusable": first_line(error)}
    if not all(w.isfinite().all() for w in weights):
        return row | {"unusable": "weights are not finite after eight steps on whole weights"}
    if difference(weights, [p.detach() for p in make_model().parameters()]) <= TOLERANCE:
        return row | {"unusable": "weights hardly move in eight steps"}
    row |= measure(package, name)
    if package != "hf_optim" and not right(row):
        try:
            create(package, name, list(make_model().parameters()), foreach=False)
        except (TypeError, ValueError):
            return row
        again = measure(package, name, foreach=False)
        if right(again):
            return {"package": package, "name": name, "options": "foreach=False", **again}
    return row


def right(row: dict) -> bool:
    return row.get("difference", float("inf")) <= TOLERANCE


def table(rows: list[dict]) -> str:
    """A markdown table, one row per optimizer."""
    lines = ["| optimizer | result | collectives per matrix |", "|---|---|---|"]
    for row in rows:
        options = f" ({row['options']})" if "options" in row else ""
        label = f"{row['package']} `{row['name']}`{options}"
        if "difference" in row:
            verdict = "right" if right(row) else "**wrong**"
            lines.append(
                f"| {label} | {verdict}, off by {row['difference']:.1g} | {row['collectives_per_matrix']:g} |"
            )
        else:
            lines.append(f"| {label} | {row.get('error') or 'not comparable: ' + row['unusable']} | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Compares steps on shards with steps on whole weights.")
    parser.add_argument("--filter", default="*", help="measure these names only, and write no file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # hints of single optimizers
    about = environment()
    torch.set_num_threads(1)  # a pool of threads does not survive the forks
    names = [pair for pair in candidates() if fnmatch.fnmatch(pair[1], args.filter)]
    rows = [compare(*pair) for pair in track(names, "Comparing", disable=None)]
    print(table(rows))
    if args.filter == "*":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
        record = {**about, "steps": STEPS, "ranks": RANKS, "tolerance": TOLERANCE, "results": rows}
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
