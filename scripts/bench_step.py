# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Times optimizer steps against `torch.optim.AdamW(fused=True)` and against the bytes that have to move.

    python scripts/bench_step.py adalo adamw smmf                      # GPT-2 small, one thread
    python scripts/bench_step.py --shapes lora --processes 3           # all names of hf_optim on a LoRA list
    python scripts/bench_step.py adamw --shapes llama-8b --dtype bfloat16 --options precision=stochastic  # on a GPU
    python scripts/bench_step.py torch:NAdam transformers:Adafactor pytorch_optimizer:SM3   # others, if installed

Every process steps the same tensors by fused AdamW, copies memory, steps them by the optimizer, by fused AdamW again,
and so on; the figures are medians over rounds, then over fresh processes. On a CPU the clock is the CPU time of the
process. `first step` is the CPU time of a first step where nothing was ever compiled, in a process of its own, that of
the compilers it starts included; `extra` what a step allocates beyond weights, gradients and state; `x bytes` the time
relative to that of moving each byte once.
"""

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import environment
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import hf_optim
from hf_optim.core.codegen import Programs
from hf_optim.optim_args import split_optim_args
from hf_optim.trainer.register import parse_optim_args


RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "pytorch_optimizer", "optimi", "bitsandbytes")
FIGURES = ("ratio", "times_bytes", "ms", "us_per_tensor", "state_bytes", "extra_bytes", "first_seconds", "programs")


def gpt2() -> list[tuple[int, ...]]:
    layer = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
    layer += [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


def llama(vocab: int, width: int, inner: int, keys: int, layers: int) -> list[tuple[int, ...]]:
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    layer = [*attention, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocab, width), *layer * layers, (width,)]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "gpt2": gpt2,
    "lora": lambda: [(16, 4096), (4096, 16)] * 224,  # rank 16, seven matrices in each of 32 layers
    "small": lambda: [(4, 4)] * 448,  # what is left is the overhead for each tensor
    "llama-1b": lambda: llama(128256, 2048, 8192, 512, 16),
    "llama-8b": lambda: [*llama(128256, 4096, 14336, 1024, 32), (128256, 4096)],
}


class Bench:
    """Parameters with gradients, the reference that steps them, and the clock."""

    def __init__(self, shapes: str, dtype: str, device: str) -> None:
        self.device, draw = torch.device(device), torch.Generator(device).manual_seed(0)
        sizes, kind = SHAPES[shapes](), getattr(torch, dtype)
        self.params = [torch.nn.Parameter(self._normal(size, draw, 0.02).to(kind)) for size in sizes]
        for p in self.params:
            p.grad = self._normal(p.shape, draw, 1e-3).to(kind)
        self.numel = sum(p.numel() for p in self.params)
        self.reference = torch.optim.AdamW(self.params, lr=1e-6, weight_decay=0.01, fused=True)
        # no cache holds 256 MiB; on a GPU what is copied takes a millisecond, next to which its start is nothing
        self.memory = torch.zeros(2, 1 << (29 if self.device.type == "cuda" else 26), device=self.device)
        self.reference.step()

    def _normal(self, size: Any, draw: torch.Generator, scale: float) -> torch.Tensor:
        return torch.randn(size, generator=draw, device=self.device) * scale

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        start_time = time.process_time()
        call()
        return time.process_time() - start_time

    def bandwidth(self) -> float:
        """Bytes read and written per second by a copy."""
        return 2 * self.memory[0].nbytes / self.seconds(lambda: self.memory[0].copy_(self.memory[1]))

    def extra(self, call: Callable[[], Any]) -> int:
        """The most that one call allocates at a time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        now = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return peak


def build(name: str, params: list[torch.nn.Parameter], options: str) -> torch.optim.Optimizer:
    """One of ours by its name, anybody's by `package:Class`."""
    package, colon, cls = name.partition(":")
    if not colon:
        info = hf_optim.info(name)
        given = {"backend": "fused", **parse_optim_args(info, options)}
        decay = {} if info.preset.get("decay") == "cpr" else {"weight_decay": 0.01}
        return hf_optim.create(name, params, lr=1e-6, **decay, **given)
    if package not in PACKAGES:
        raise typer.BadParameter(f"{name!r}: the packages are {', '.join(PACKAGES)}")
    module = importlib.import_module(
        {"torch": "torch.optim", "bitsandbytes": "bitsandbytes.optim"}.get(package, package)
    )
    kwargs = {"relative_step": False, "scale_parameter": False} if name == "transformers:Adafactor" else {}
    return getattr(module, cls)(params, lr=1e-6, **kwargs, **split_optim_args(options))


def cpu_seconds() -> float:
    """Of this process and of the compilers it started."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in tensors)


def measure(bench: Bench, name: str, options: str, rounds: int) -> dict[str, float]:
    """The figures of one optimizer in this process; without rounds those of its first step."""
    optimizer = build(name, bench.params, options)
    needs_loss = getattr(optimizer, "needs_loss", False)
    loss = torch.ones((), device=bench.device)
    step = (lambda: optimizer.step(loss=loss)) if needs_loss else optimizer.step
    before, programs = cpu_seconds(), Programs.built
    step()
    if not rounds:
        return {"first_seconds": cpu_seconds() - before, "programs": Programs.built - programs}
    step()
    reference, times, ratios, speeds = bench.seconds(bench.reference.step), [], [], []
    for _ in range(rounds):
        if not speeds or bench.numel > 1 << 20:  # it empties the caches, which is all that tiny tensors would wait for
            speeds.append(bench.bandwidth())
        times.append(bench.seconds(step))
        after = bench.seconds(bench.reference.step)
        ratios.append(2 * times[-1] / (reference + after))
        reference = after
    seconds, held = statistics.median(times), state_bytes(optimizer)
    moved = sum(2 * p.nbytes + p.grad.nbytes for p in bench.params) + 2 * held
    return {
        "ratio": statistics.median(ratios),
        "times_bytes": seconds / (moved / statistics.median(speeds)),
        "ms": 1e3 * seconds,
        "us_per_tensor": 1e6 * seconds / len(bench.params),
        "state_bytes": held / bench.numel,
        "extra_bytes": bench.extra(step) / bench.numel,
    }


def measured(bench: Bench, name: str, options: str, rounds: int) -> dict[str, float] | None:
    """The figures of one optimizer; None if the device has not the memory for it."""
    try:
        return measure(bench, name, options, rounds)
    except torch.OutOfMemoryError:
        return None


def in_a_process(call: list[str], names: list[str], rounds: int, caches: str) -> dict[str, Any]:
    """The figures of every name, measured in a fresh process; compilers keep what they make in the folder `caches`."""
    call = [*call, *names, "--rounds", str(rounds), "--processes", "0"]
    # compilers as children of the process: those of a pool of workers would not be counted
    env = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/code", "TMPDIR": caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(call, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(call)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_processes(call: list[str], names: list[str], rounds: int, processes: int, title: str) -> list[dict[str, Any]]:
    """What each of so many processes measured of every name, and what one more did of its first step."""
    with Progress() as progress, tempfile.TemporaryDirectory() as caches:
        task = progress.add_task(title, total=processes + len(names))
        found = []
        for _ in range(processes):
            found.append(in_a_process(call, names, rounds, caches))
            progress.advance(task)
        for name in names:
            with tempfile.TemporaryDirectory() as empty:
                first = in_a_process(call, [name], 0, empty)[name]
            for one in found:
                one[name] = first and one[name] and {**one[name], **first}
            progress.advance(task)
    return found


def as_table(record: dict[str, Any]) -> Table:
    table = Table(title=f"{record['shapes']}, {record['dtype']}, {record['device']}, {record['threads']} thread(s)")
    heads = ("time / fused AdamW", "x bytes", "ms", "us per tensor", "state B/param", "extra B/param", "first step s")
    for head in ("optimizer", *heads, "programs"):
        table.add_column(head, justify="left" if head == "optimizer" else "right")
    for name, row in record["optimizers"].items():
        table.add_row(name, *(f"{row[key]:.3g}" for key in FIGURES))
    return table


def draw(record: dict[str, Any], path: Path) -> None:
    """Bars of the time relative to fused AdamW."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(record["optimizers"])
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.3 * len(names)), layout="constrained")
    axes.barh(names, [record["optimizers"][name]["ratio"] for name in names])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("time of a step / fused AdamW")
    axes.set_title(f"{record['shapes']}, {record['dtype']}, {record['device']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Ours by name, others as package:Class. Default: all ours.")
    ] = None,
    shapes: Annotated[str, typer.Option(help=f"Parameters: {', '.join(SHAPES)}.")] = "gpt2",
    dtype: Annotated[str, typer.Option(help="Of weights and gradients.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    options: Annotated[str, typer.Option(help="Options of the optimizers, as in --optim_args.")] = "",
    rounds: Annotated[
        int, typer.Option(help="Steps timed in every process; 0 (with --processes 0): the first step.", min=0)
    ] = 9,
    threads: Annotated[int, typer.Option(help="Of torch, on a CPU.", min=1)] = 1,
    processes: Annotated[int, typer.Option(help="Fresh processes; 0 measures in this one.", min=0)] = 3,
    output_dir: Annotated[Path, typer.Option(help="Where JSON and plot go.")] = RESULTS,
) -> None:
    """Time optimizer steps against fused AdamW."""
    names = list(names or hf_optim.list_optimizers())
    if shapes not in SHAPES:
        raise typer.BadParameter(f"--shapes must be one of {', '.join(SHAPES)}, got {shapes!r}")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(
            f"--device must be cpu or cuda (one of several: CUDA_VISIBLE_DEVICES), got {device!r}"
        )
    if processes and not rounds:
        raise typer.BadParameter("--rounds 0 takes the first step in this process: add --processes 0")
    if not processes:
        torch.set_num_threads(threads)
        bench = Bench(shapes, dtype, device)
        print(json.dumps({name: measured(bench, name, options, rounds) for name in names}))
        return
    call = [sys.executable, __file__, "--shapes", shapes, "--dtype", dtype, "--device", device]
    call += ["--options", options, "--threads", str(threads)]
    found = in_processes(call, names, rounds, processes, f"{len(names)} optimizers on {shapes}")
    fit = [name for name in names if all(one[name] for one in found)]
    rows = {n: {key: statistics.median(one[n][key] for one in found) for key in FIGURES} for n in fit}
    what = torch.cuda.get_device_name() if device == "cuda" else environment()["machine"]
    record = {"date": str(date.today()), "device": what, "torch": torch.__version__, "shapes": shapes, "dtype": dtype}
    record |= {"options": options, "threads": threads, "processes": processes, "rounds": rounds, "optimizers": rows}
    record["out_of_memory"] = [name for name in names if name not in fit]
    Console().print(as_table(record))
    if record["out_of_memory"]:
        Console().print("out of memory:", ", ".join(record["out_of_memory"]))
    output_dir.mkdir(parents=True, exist_ok=True)
    stem = f"step_{shapes}_{dtype}_{device}" + (f"_{options.replace('=', '-').replace(',', '_')}" if options else "")
    (output_dir / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, output_dir / f"{stem}.png")


if __name__ == "__main__":
    typer.run(main)
