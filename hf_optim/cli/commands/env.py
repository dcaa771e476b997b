# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim env`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from typing import Annotated, Any

import typer


PACKAGES = ("hf-optim", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "trl", "deepspeed")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions and devices: paste this into a bug report."""
    facts = {"python": platform.python_version(), "platform": platform.platform(), **_versions(), **_torch()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        typer.echo(f"- {name}: {value}")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _torch() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,  # with the build, which the metadata leaves out
        "cuda devices": ", ".join(devices) or "none",
        "cpu threads": torch.get_num_threads(),
        "compiler of backend=fused": "Triton" if devices else shutil.which("g++") or shutil.which("clang++") or "none",
    }
