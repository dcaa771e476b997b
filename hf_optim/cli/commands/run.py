# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim run SCRIPT ...`."""

from __future__ import annotations

import typer


def run(ctx: typer.Context) -> None:
    """Start an unmodified training script with every optimizer registered and the loss delivered."""
    from ... import run as runner

    raise typer.Exit(runner.main(ctx.args))
