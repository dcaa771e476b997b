# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim list`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def list_(
    filter: Annotated[str, typer.Argument(help="Shell pattern, such as 'ad*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the optimizers: every name is a choice of --optim."""
    from rich.console import Console
    from rich.table import Table

    from ... import registry
    from ..errors import UserError

    names = registry.list_optimizers(filter)
    if not names:
        raise UserError(f"no optimizer matches {filter!r}; `hf-optim list` shows all")
    infos = [registry.info(name) for name in names]
    if as_json:
        typer.echo(json.dumps([info.as_dict() for info in infos], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("state B/param", justify="right", no_wrap=True)
    table.add_column("what it is")
    for info in infos:
        summary = info.summary + (" (needs the loss)" if info.needs_loss else "")
        table.add_row(info.name, f"{info.bytes_per_parameter:.3g}", summary)
    Console().print(table)
