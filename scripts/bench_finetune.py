# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Measures full-parameter fine-tuning steps of a Llama: peak memory and speed, one optimizer after the other.

    python scripts/bench_finetune.py                                     # 8B on a GPU, a tiny one on a CPU
    python scripts/bench_finetune.py --model llama-1b --optim adamw_torch_fused --optim adafactor \\
        --optim "adafactor_corrected:precision=stochastic,backend=fused+release"

`--optim` takes any name of `Trainer --optim`, then `:` and what `--optim_args` would hold, then `+release` to step
inside backward and free every gradient at once. Each one runs in a fresh process, so that no peak holds memory of
another and running out of memory ends one process only. Weights are bf16 and random (made from the config, on the
device), activations are checkpointed, the text is Shakespeare, gradients are not clipped. The results of one machine,
set of versions and settings share a file, each with its date: what is measured again replaces its row.
"""

import importlib.metadata
import json
import multiprocessing
import re
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import transformers
import typer
from matplotlib.figure import Figure
from measure import environment, now, state_bytes
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Trainer, TrainingArguments

import hf_optim


TEXT = Path(__file__).parent / "data" / "shakespeare" / "train.txt"
RESULTS = Path(__file__).resolve().parent / "results"
LEARNING_RATE = 1e-5
BASELINE = "adamw_torch_fused"
RELEASE = "+release"
CONFIGS = {  # the shapes of Llama 3 8B and Llama 3.2 1B, and a small one for CPUs
    "llama-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "llama-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    ),
}
OPTIMIZERS = [
    BASELINE,
    "adafactor",
    *(["adamw_bnb_8bit"] if importlib.util.find_spec("bitsandbytes") else []),
    "adamw:precision=stochastic,state_dtype=bfloat16",
    "adamw:precision=stochastic,state_dtype=bfloat16+release",
    "adafactor_corrected:precision=stochastic",
    "adafactor_corrected:precision=stochastic+release",
    "sm3:precision=stochastic+release",
    "smmf:precision=stochastic+release",
]


class Arm(NamedTuple):
    """One optimizer to measure, as `--optim` and `--optim_args` of Trainer, and whether gradients are released."""

    text: str
    optim: str
    optim_args: str | None
    release: bool

    @classmethod
    def parse(cls, text: str) -> "Arm":
        name, _, options = text.removesuffix(RELEASE).partition(":")
        return cls(text, name.strip(), options or None, text.endswith(RELEASE))

    def check(self) -> None:
        """What can be known before anything is measured: the name, the options, whether the package is there."""
        if self.release and self.optim not in hf_optim.list_optimizers():
            raise ValueError(
                f"{self.text!r}: {RELEASE!r} goes with the optimizers of hf_optim, not with {self.optim!r}"
            )
        with tempfile.TemporaryDirectory() as folder:
            Trainer.get_optimizer_cls_and_kwargs(self.arguments(folder, use_cpu=True))

    def arguments(self, folder: str, use_cpu: bool) -> TrainingArguments:
        return TrainingArguments(
            folder,
            optim=self.optim,
            optim_args=self.optim_args,
            learning_rate=LEARNING_RATE,
            use_cpu=use_cpu,
            report_to="none",
        )


class Job(NamedTuple):
    """What all optimizers have in common."""

    config: PreTrainedConfig
    device: str
    seq_length: int
    batch_size: int
    warmup: int
    steps: int


class Stopwatch:
    """Adds up the times between `start` and `stop` on the clock of the device, without making the device wait."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self, *_) -> None:
        if self.device.type == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    start = stop = mark

    def seconds(self) -> float:
        """The sum since the last call; the device must be done."""
        pairs, self.marks = list(zip(self.marks[::2], self.marks[1::2], strict=True)), []
        if self.device.type == "cpu":
            return sum(stop - start for start, stop in pairs)
        return sum(start.elapsed_time(stop) for start, stop in pairs) / 1e3


def new_model(config: PreTrainedConfig, device: str) -> torch.nn.Module:
    """Random bf16 weights that are born on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    # The name that all of transformers 5 has.
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def new_optimizer(model: torch.nn.Module, arm: Arm, clock: Stopwatch) -> torch.optim.Optimizer:
    """The optimizer that Trainer makes. Under release, `clock` times what runs between its two hooks."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = arm.arguments(folder, use_cpu=clock.device.type == "cpu")
        optimizer = Trainer(model, arguments).create_optimizer()
    if arm.release:  # the hooks of a parameter run in the order in which they were registered
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(clock.start)
        optimizer.release_gradients()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(clock.stop)
    return optimizer


def new_batches(job: Job, count: int) -> torch.Tensor:
    """`count` batches of token ids, the bytes of a text which starts over where it ends."""
    ids = torch.tensor(list(TEXT.read_bytes())) % job.config.vocab_size
    place = torch.arange(count * job.batch_size * job.seq_length) % len(ids)
    return ids[place].view(count, job.batch_size, job.seq_length).to(job.device)


def train_step(model, optimizer, ids: torch.Tensor, clock: Stopwatch) -> torch.Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    if hasattr(optimizer, "report_loss"):
        optimizer.report_loss(loss)
    loss.backward()
    clock.start()
    optimizer.step()
    clock.stop()
    optimizer.zero_grad()
    return loss.detach()


def traced_peak(step) -> int:
    """How far `step` makes the CPU allocator grow, at most, in bytes: the CPU has no counter of its peak."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def measure(job: Job, arm: Arm) -> dict:
    """All figures of one optimizer, or the error that kept them from being measured."""
    transformers.utils.logging.set_verbosity_error()
    hf_optim.register()
    try:
        return {"optim": arm.text, **measure_steps(job, arm)}
    except Exception as error:  # the others shall be measured, whatever this one fails with
        memory = isinstance(error, torch.OutOfMemoryError)
        return {"optim": arm.text, "out_of_memory": memory, "error": f"{type(error).__name__}: {error}"}


def timed_steps(model, optimizer, batches: torch.Tensor, clock: Stopwatch) -> list[dict]:
    rows = []
    for ids in batches:
        started = now()
        loss = train_step(model, optimizer, ids, clock)
        rows.append({"whole": now() - started, "inside": clock.seconds(), "loss": loss.item()})
    return rows


def peaks() -> tuple[int, int]:
    """The most bytes that tensors took, and that the allocator took from the device, since the last call."""
    found = torch.accelerator.max_memory_allocated(), torch.accelerator.max_memory_reserved()
    torch.accelerator.reset_peak_memory_stats()
    return found


def measure_steps(job: Job, arm: Arm) -> dict:
    torch.manual_seed(0)
    clock = Stopwatch(torch.device(job.device))
    on_cpu = clock.device.type == "cpu"
    model = new_model(job.config, job.device)
    batches = new_batches(job, job.warmup + job.steps)
    optimizer = new_optimizer(model, arm, clock)
    if not on_cpu:
        torch.accelerator.empty_cache()
        peaks()
    first = timed_steps(model, optimizer, batches[: job.warmup], clock)
    first_peak, first_reserved = (None, None) if on_cpu else peaks()
    timed = timed_steps(model, optimizer, batches[job.warmup :], clock)
    state = state_bytes(optimizer)
    if on_cpu:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peak = weights + state + traced_peak(lambda: train_step(model, optimizer, batches[0], clock))
    else:
        peak, reserved = peaks()
    seconds = statistics.median(row["whole"] for row in timed)
    return {
        "parameters": model.num_parameters(),
        "peak_bytes": peak if on_cpu else max(peak, first_peak),
        "warmup_peak_bytes": first_peak,  # compiling may take memory that no later step does
        "reserved_bytes": None if on_cpu else max(reserved, first_reserved),
        "state_bytes": state,
        "step_seconds": seconds,
        "tokens_per_second": batches[0].numel() / seconds,
        "optimizer_seconds": statistics.median(row["inside"] for row in timed),
        "first_step_seconds": first[0]["whole"],  # with what is compiled, and the making of the state
        "losses": [row["loss"] for row in first + timed],
    }


def measure_alone(job: Job, arm: Arm) -> dict:
    """[`measure`] in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, job, arm).result()
        except BrokenProcessPool:  # the kernel kills a process when the host runs out of memory
            return {"optim": arm.text, "out_of_memory": False, "error": "the process was killed"}


def unit(results: list[dict]) -> tuple[str, int]:
    large = any(r.get("peak_bytes", 0) >= 2**30 for r in results)
    return ("GiB", 2**30) if large else ("MiB", 2**20)


def failure(result: dict) -> str:
    return "out of memory" if result["out_of_memory"] else result["error"].splitlines()[0]


def lines(text: str) -> str:
    """An optimizer in several lines: the name, its options, the release."""
    return re.sub(r"(?<=,)|(?=:)|(?=\+release$)", "\n", text)


def result_table(record: dict) -> Table:
    name, size = unit(record["results"])
    table = Table(
        title=f"{record['model']}, {record['batch_size']} x {record['seq_length']} tokens, {record['machine']}",
        caption=f"Medians of {record['steps']} steps. Peak: {record['memory']}.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("optimizer", overflow="fold")
    for head in (f"peak\n{name}", f"reserv.\n{name}", f"state\n{name}", "s per\nstep", "optim.\nms", "tokens\nper s"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in record["results"]:
        if "error" in r:
            table.add_row(f"{lines(r['optim'])}\n{failure(r)}", *("-" * 6))
            continue
        table.add_row(
            lines(r["optim"]),
            f"{r['peak_bytes'] / size:.2f}",
            "-" if r["reserved_bytes"] is None else f"{r['reserved_bytes'] / size:.2f}",
            f"{r['state_bytes'] / size:.2f}",
            f"{r['step_seconds']:.3f}",
            f"{1e3 * r['optimizer_seconds']:.1f}",
            f"{r['tokens_per_second']:,.0f}",
        )
    return table


def ratios(results: list[dict]) -> list[str]:
    """Every optimizer against the baseline, where both were measured."""
    done = {r["optim"]: r for r in results if "error" not in r}
    base = done.pop(BASELINE, None)
    if base is None:
        return [f"No ratios: {BASELINE} was not measured."]
    return [
        f"{name}: {r['peak_bytes'] / base['peak_bytes']:.3f} x the peak memory and "
        f"{r['tokens_per_second'] / base['tokens_per_second']:.3f} x the tokens per second of {BASELINE}"
        for name, r in done.items()
    ]


def bars(record: dict) -> Figure:
    """Peak memory and tokens per second; an optimizer that failed has a word in place of its bars."""
    results = record["results"][::-1]  # the first on top
    name, size = unit(results)
    figure = Figure(figsize=(11, 1.5 + 0.6 * len(results)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [lines(r["optim"]) for r in results]
    for axes, key, scale, color in ((left, "peak_bytes", size, "#0072B2"), (right, "tokens_per_second", 1, "#009E73")):
        drawn = axes.barh(labels, [r.get(key, 0) / scale for r in results], color=color)
        texts = [failure(r)[:40] if "error" in r else f"{r[key] / scale:,.4g}" for r in results]
        axes.bar_label(drawn, texts, padding=3, fontsize=8)
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.3)
    left.tick_params(axis="y", labelsize=8)
    left.set_xlabel(f"peak memory, {name} ({record['memory']})")
    right.set_xlabel("tokens per second")
    tokens = f"{record['batch_size']} x {record['seq_length']} tokens per step"
    figure.suptitle(f"{record['model']}, bf16 weights, {tokens}\n{record['machine']}", fontsize=11)
    return figure


def chosen_config(model: str) -> tuple[str, PreTrainedConfig]:
    """The name for the file, and the config: one of ours or that of a path."""
    if model in CONFIGS:
        return model, CONFIGS[model]
    path = Path(model)
    if not path.exists():
        raise typer.BadParameter(f"`--model` is {', '.join(CONFIGS)} or the path of a config, got {model!r}.")
    named = path.parent if path.name == "config.json" else path
    return named.stem if named.is_file() else named.resolve().name, AutoConfig.from_pretrained(model)


def versions() -> dict:
    found = {name: importlib.util.find_spec(name) for name in ("accelerate", "bitsandbytes", "triton")}
    return {name: importlib.metadata.version(name) for name in found if found[name]} | {"cuda": torch.version.cuda}


def earlier(path: Path, head: dict, texts: list[str]) -> list[dict]:
    """Results in the file that were measured under the same head, the date aside, and are not measured again."""
    old = json.loads(path.read_text()) if path.exists() else {}
    results = old.pop("results", [])
    return [r for r in results if r["optim"] not in texts] if old | {"date": head["date"]} == head else []


def bench(
    model: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(CONFIGS)} or the path of a config. Default: llama-8b, on a CPU tiny."),
    ] = None,
    optim: Annotated[list[str] | None, typer.Option(help="NAME[:OPTIONS][+release]; may be given many times.")] = None,
    seq_length: Annotated[int, typer.Option(min=2, help="Tokens per example.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, which make the state and compile.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    output_dir: Annotated[Path, typer.Option(help="For the JSON file and the plot.")] = RESULTS,
) -> None:
    """Peak memory, seconds per step and tokens per second of fine-tuning a Llama with each optimizer."""
    transformers.utils.logging.set_verbosity_error()
    hf_optim.register()
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    name, config = chosen_config(model or ("tiny" if device == "cpu" else "llama-8b"))
    arms = [Arm.parse(text) for text in optim or OPTIMIZERS]
    for arm in arms:
        try:
            arm.check()
        except (ValueError, TypeError, ImportError) as error:
            raise typer.BadParameter(str(error)) from error
    job = Job(config, device, seq_length, batch_size, warmup, steps)
    run_all(job, arms, name, output_dir, Console())


def run_all(job: Job, arms: list[Arm], name: str, output_dir: Path, console: Console) -> None:
    on_cpu = job.device == "cpu"
    shared = {key: value for key, value in job._asdict().items() if key != "config"}
    memory = "CPU allocator, a traced step" if on_cpu else "torch.accelerator.max_memory_allocated"
    head = {**environment(torch.device(job.device)), **versions(), "model": name, **shared, "memory": memory}
    slug = "cpu" if on_cpu else re.sub(r"\W+", "-", head["machine"]).strip("-").lower()
    path = output_dir / f"finetune_{name}_{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**head, "results": earlier(path, head, [arm.text for arm in arms])}
    for arm in arms:
        console.rule(arm.text)
        record["results"].append({**measure_alone(job, arm), "date": head["date"]})
        path.write_text(json.dumps(record, indent=1) + "\n")  # after each: what there is survives an interruption
        bars(record).savefig(path.with_suffix(".png"))
    console.print(result_table(record))
    for line in ratios(record["results"]):
        console.print(line, highlight=False, soft_wrap=True)
    if any("error" in r and not r["out_of_memory"] for r in record["results"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(bench)
