# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim show NAME`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def show(
    name: Annotated[str, typer.Argument(help="A name of `hf-optim list`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an optimizer: its algorithm, options, flags, memory and learning rates."""
    from ... import registry
    from ..errors import UserError

    try:
        info = registry.info(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    if as_json:
        typer.echo(json.dumps(info.as_dict(), indent=2))
    else:
        _print(info.as_dict(), info.doc)


def _print(facts: dict[str, Any], doc: str) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False, markup=False)
    lr = facts["learning_rate"]["range"]
    source = facts["learning_rate"]["source"]
    rates = f"{lr[0]:g} to {lr[2]:g}, best {lr[1]:g} ({source})" if lr else "plays no part"
    typer.echo(f"{facts['name']}: {facts['summary']}\n\n{doc}\n")  # lines stay as they are
    for label, text in {
        "paper": facts["paper"],
        "state": f"{facts['bytes_per_parameter']:.3g} bytes per parameter (fp32 4096 x 4096 weight, defaults)",
        "needs the loss": "yes: LossAwareTrainer, LossAwareMixin or `hf-optim run`" if facts["needs_loss"] else "no",
        "learning_rate": rates,
        "preset": ", ".join(f"{k}={v}" for k, v in facts["preset"].items()) or "none",
        "flags": ", ".join(facts["flags"]),
        **{f"under {layout}": verdict for layout, verdict in facts["distributed"].items()},
    }.items():
        console.print(f"{label:15} {text}", soft_wrap=True)
    table = Table(Column("option", no_wrap=True), "default", "takes", "meaning", "from", box=None, pad_edge=False)
    for option in facts["options"]:
        given = f"--{option['training_argument']}" if option["training_argument"] else ""
        takes = option["range"] if option["type"] != "bool" else "true or false"
        table.add_row(option["name"], str(option["default"]), takes, option["doc"], given)
    console.print()
    console.print(table)
    console.print(
        '\nGive options as --optim_args "name=value,name=value"; lr and weight_decay by their own arguments.'
    )
