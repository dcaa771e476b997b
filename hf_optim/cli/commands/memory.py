# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim memory MODEL`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from ...memory import MemoryEstimate

UNITS = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}
PARTS = ("weights", "gradients", "buckets", "state", "temporaries", "total")
HEADS = {"gradients": "grads", "temporaries": "step"}  # 80 columns


def memory(
    model: Annotated[str, typer.Argument(help="A config.json, a folder with one, or a model of the Hub.")],
    optim: Annotated[str, typer.Option(help="Names of `hf-optim list`, separated by commas.")] = "all",
    optim_args: Annotated[str | None, typer.Option(help="The value of --optim_args.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32, if the weights are not loaded as saved.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="That of accelerate: no, bf16 or fp16.")] = "no",
    ddp: Annotated[bool, typer.Option("--ddp", help="A whole model on every device.")] = False,
    fsdp2: Annotated[bool, typer.Option("--fsdp2", help="Shards of everything on every device.")] = False,
    world: Annotated[int, typer.Option(help="Number of devices, with --ddp or --fsdp2.")] = 1,
    release: Annotated[bool, typer.Option("--release", help="Short for --optim-args gradient_release=true.")] = False,
    lora: Annotated[str | None, typer.Option(help="Train adapters: 'r=16,target_modules=all-linear'.")] = None,
    budget: Annotated[str | None, typer.Option(help="Memory of a device, such as 24GB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the memory of a training run for every optimizer. No weight is read, no device is needed."""
    from ... import registry
    from ...trainer import blueprint
    from ..errors import UserError

    if ddp and fsdp2:
        raise UserError("--ddp or --fsdp2, not both")
    layout = {"layout": "ddp" if ddp else "fsdp2" if fsdp2 else "single", "world": world}
    try:
        names = registry.list_optimizers() if optim == "all" else [name.strip() for name in optim.split(",")]
        infos = [registry.info(name) for name in names]
        limit = None if budget is None else _bytes(budget)
        net: Any = blueprint.from_config(model, dtype)
        if lora is not None:
            net = blueprint.with_lora(net, lora)
        text, released = _with_release(optim_args, release)
        how = {**layout, "mixed_precision": mixed_precision}
        found, left_out = _estimates(net, infos, text, how, lenient=optim == "all")
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(str(error)) from None
    facts = {**_facts(model, net, how), "release": released}
    if as_json:
        rows = [estimate.as_dict() for estimate in found]
        typer.echo(json.dumps({**facts, "budget": limit, "optimizers": rows, "left_out": left_out}, indent=2))
    else:
        _print(facts, found, left_out, budget, limit)


def _bytes(text: str) -> int:
    """The number of bytes in a text like 24GB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|MB|GiB|MiB)", text.strip())
    if match is None:
        raise ValueError(f"`budget` must be a number with one of {', '.join(UNITS)}, such as 24GB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def _with_release(optim_args: str | None, release: bool) -> tuple[str, bool]:
    """The options with what `--release` stands for, and whether gradients are released by one or the other."""
    from ...core import Optimizer
    from ...optim_args import split_optim_args

    given = split_optim_args(optim_args)
    if release and "gradient_release" in given:
        raise ValueError("give --release, or `gradient_release` in --optim-args, not both")
    released = release or given.get("gradient_release", False)
    given |= {"gradient_release": released} if released else {}
    return json.dumps(given), Optimizer.options()["gradient_release"].parse("memory", released)


def _estimates(
    net: Any, infos: list[Any], optim_args: str | None, how: dict[str, Any], lenient: bool
) -> tuple[list[MemoryEstimate], dict[str, str]]:
    """Estimates by their totals, and why others cannot be had, which is an error where they were asked for by name."""
    from ...memory import estimate_memory
    from ...trainer.register import parse_optim_args

    found, left_out = [], {}
    for info in infos:
        try:
            found.append(estimate_memory(net, info.name, **how, **parse_optim_args(info, optim_args)))
        except (ValueError, TypeError) as error:
            if not lenient:
                raise
            left_out[info.name] = str(error)
    if not found:
        raise ValueError("no optimizer can do that; the first says: " + next(iter(left_out.values())))
    return sorted(found, key=lambda estimate: estimate.total), left_out


def _facts(source: str, net: Any, how: dict[str, Any]) -> dict[str, Any]:
    inner = net.get_base_model() if hasattr(net, "peft_config") else net
    return {
        "model": source,
        "class": type(inner).__name__,
        "dtype": str(inner.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in net.parameters()),
        "trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
        **how,
    }


def _print(
    facts: dict[str, Any], found: list[MemoryEstimate], left_out: dict[str, str], budget: str | None, limit: int | None
) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from ...verdicts import TITLES

    console = Console(highlight=False, markup=False)
    where = TITLES[facts["layout"]] + (f" on {facts['world']} devices" if facts["layout"] != "single" else "")
    console.print(
        f"{facts['class']} in {facts['dtype']}, {facts['parameters']:,} parameters, {facts['trained']:,} trained; "
        f"{where}, mixed precision: {facts['mixed_precision']}{', gradients released' if facts['release'] else ''}\n"
        f"GB (1e9 bytes) per device while the optimizer steps{f'; `left` is of {budget}' if budget else ''}\n",
        soft_wrap=True,
    )
    parts = [part for part in PARTS if part != "buckets" or any(estimate.buckets for estimate in found)]
    table = Table(Column("optimizer", no_wrap=True), box=None, pad_edge=False)
    for column in [*(HEADS.get(part, part) for part in parts), *(["left"] if budget else [])]:
        table.add_column(column, justify="right", no_wrap=True)
    for estimate in found:
        row = [f"{estimate.as_dict()[part] / 1e9:.2f}" for part in parts]
        if limit is not None:
            left = limit - estimate.total
            row.append(f"{left / 1e9:.2f}" if left >= 0 else "no")
        table.add_row(estimate.name, *row)
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", soft_wrap=True)
    gathered = ", the whole layers that FSDP2 gathers" if facts["layout"] == "fsdp2" else ""
    console.print(
        "\n`step` is what the step holds for a moment, of compiled steps an upper bound. Not counted: activations "
        f"(gone by then, but they must fit too){gathered}, and what driver, libraries and allocator keep.",
        soft_wrap=True,
    )
