# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim`: what there is, what it takes, and a way to start any script with it."""

from __future__ import annotations

import sys

import typer

from .. import run as runner
from .commands.check import check
from .commands.env import env
from .commands.list import list_
from .commands.memory import memory
from .commands.run import run
from .commands.show import show
from .commands.tails import tails
from .errors import UserError


app = typer.Typer(
    name="hf-optim",
    help="Optimizers after Adam for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_)
app.command("show")(show)
app.command("check")(check)
app.command("memory")(memory)
app.command("env")(env)
app.command("tails")(tails)
app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(
    run
)


def main() -> None:
    """Entry point. A user's mistake is one line on stderr and exit code 2; anything else keeps its traceback."""
    if sys.argv[1:2] == ["run"]:  # here, so that the exceptions of the script are not taken for those of the command
        sys.exit(runner.main(sys.argv[2:]))
    try:
        app()
    except UserError as error:
        print(f"hf-optim: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
