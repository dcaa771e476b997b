# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Write the optimizer table of the README from the registry: `python scripts/make_table.py [--check]`."""

import sys
from pathlib import Path

import hf_optim


README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- optimizers: start, by scripts/make_table.py -->", "<!-- optimizers: end -->"


def table() -> str:
    """One row per registered optimizer."""
    head = "| `--optim` | what it is | state, bytes per parameter | `learning_rate` | paper |"
    rows = [head, "|---|---|---|---|---|"]
    for name in hf_optim.list_optimizers():
        info = hf_optim.info(name)
        rate = f"{info.lr[0]:g} to {info.lr[1]:g}" if info.lr else "plays no part"
        summary = info.summary + ("; needs the loss" if info.needs_loss else "")
        label = info.paper if info.paper.startswith("doi:") else f"arXiv {info.paper}"
        rows.append(f"| `{name}` | {summary} | {info.bytes_per_parameter:.3g} | {rate} | [{label}]({info.link}) |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """The README with the table between its two markers."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    old = README.read_text()
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: run `python scripts/make_table.py`" if old != new else 0)
    README.write_text(new)
