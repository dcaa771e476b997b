# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim check NAME --accelerate-config FILE`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def check(
    name: Annotated[str, typer.Argument(help="A name of `hf-optim list`.")],
    accelerate_config: Annotated[str, typer.Option(help="The file given to `accelerate launch --config_file`.")],
    optim_args: Annotated[str | None, typer.Option(help="The value of --optim_args.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether an optimizer is right under a launch config: exit code 0 if so, 1 if not, with the alternative."""
    import yaml

    from ... import registry
    from ...trainer.layout import of_accelerate
    from ...trainer.register import parse_optim_args
    from ...verdicts import TITLES, decide
    from ..errors import UserError

    try:
        info = registry.info(name)
        options = info.cls.with_preset(info.preset, parse_optim_args(info, optim_args))
        info.cls.resolve({key: value for key, value in options.items() if key not in info.cls.by_name})
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    try:
        layout = of_accelerate(accelerate_config)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{accelerate_config} is not a file that `accelerate config` wrote: {error}") from None
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{accelerate_config}: {error}") from None
    verdict = decide(info.cls, options, layout)
    if as_json:
        facts = {"name": name, "layout": layout.kind, "fine": verdict.fine, "cost": verdict.cost}
        typer.echo(json.dumps({**facts, "reason": verdict.reason}, indent=2))
    else:
        typer.echo(f"{name} under {TITLES[layout.kind]}: {verdict}")
    raise typer.Exit(0 if verdict.fine else 1)
