# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Resume from complete checkpoints only.

Stock Trainer goes on with a fresh optimizer and scheduler, without a word, where `optimizer.pt` or `scheduler.pt` is
missing, and takes the checkpoint during whose saving a run was killed for the last one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader
from transformers import Trainer

from ..core.sharding import of_all_ranks


logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # Trainer writes it last
WEIGHTS = "model.safetensors"
NEEDED = {  # file, as Trainer names it on one process: patterns of the names it may have instead
    STATE: (STATE,),
    WEIGHTS: ("*model*.safetensors*", "*model*.bin*", "pytorch_model_fsdp*", "*/adapter_model.*"),
    "optimizer.pt": ("*optimizer*",),
    "scheduler.pt": ("scheduler.pt",),
    "rng_state.pth": ("rng_state*.pth",),
}
UNDER_DEEPSPEED = {STATE: (STATE,), "latest": ("latest",), "rng_state.pth": ("rng_state*.pth",)}
SHARDED = ("optimizer_", "pytorch_model_fsdp_")  # folders of torch.distributed.checkpoint
ALSO_READ = ("config.json", "*model*.index.json", "scaler.pt", "scheduler.pt", "global_step*/*.pt")
FORMATS = (".json", ".safetensors", ".pt", ".pth", ".bin")


def complete_checkpoint(trainer: Trainer, wanted: str | os.PathLike[str] | bool | None) -> str | bool | None:
    """The checkpoint to resume from, after a look at every file in it; the same on all ranks.

    Args:
        trainer (`Trainer`): the trainer that is about to resume.
        wanted (`str`, `bool` or None):
            What its `train(resume_from_checkpoint=...)` was given: a folder, or True for the last complete checkpoint
            in `output_dir`, with one warning if newer ones are passed over.

    Returns:
        The folder; `wanted` where there is nothing to resume from.

    Raises:
        `ValueError`: if the folder, or every checkpoint in `output_dir`, lacks a file or has a damaged one.
    """
    if wanted is None or wanted is False:
        return None
    parent = Path(str(trainer.args.output_dir)) if wanted is True else Path(wanted).absolute().parent
    present = [parent / name for name in of_all_ranks(checkpoints_in(parent))[0]]  # all look at what rank 0 sees
    candidates = present if wanted is True else [Path(wanted)]
    passed: list[str] = []
    chosen = first_complete(trainer, candidates, passed)
    if chosen is not None:
        _warn(trainer, chosen, passed)
        return str(chosen)
    if not passed:
        return True  # there is no checkpoint at all, and Trainer says so
    tried = {folder.name for folder in candidates}
    instead = first_complete(trainer, [folder for folder in present if folder.name not in tried], [])
    advice = f"Resume from {instead}, which is complete" if instead else "Start without `resume_from_checkpoint`"
    raise ValueError(
        f"cannot resume from {'; '.join(passed)}. {advice}; weights that are whole can be loaded by "
        "`from_pretrained` for a new run"
    )


def first_complete(trainer: Trainer, folders: list[Path], passed: list[str]) -> Path | None:
    """The first complete checkpoint; what is wrong with those before it is added to `passed`."""
    for folder in folders:
        problem = agreed(trainer, folder)
        if not problem:
            return folder
        passed.append(f"{folder}: {problem}")
    return None


def _warn(trainer: Trainer, chosen: Path, passed: list[str]) -> None:
    args = trainer.args
    if passed and args.process_index == 0:
        logger.warning("Resuming from %s, the last complete checkpoint. Not from %s", chosen, "; ".join(passed))
    own = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    if not (chosen / own).is_file():
        logger.warning(
            "%s has no %s: it was saved by another number of processes, or its saving was cut short. Training goes "
            "on, but with other random numbers (dropout, shuffling) than the interrupted run", chosen, own,
        )  # fmt: skip


def checkpoints_in(folder: Path) -> list[str]:
    """Names of the checkpoint folders by step, the last one first."""
    steps = {path.name: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*/")}
    return sorted(filter(steps.get, steps), key=lambda name: -int(name.partition("-")[2]))


def agreed(trainer: Trainer, folder: Path) -> str:
    """What keeps any rank from resuming from a folder; empty if nothing does. One process per machine looks."""
    mine = next(problems(trainer, folder), "") if trainer.args.local_process_index == 0 else ""
    return next(filter(None, of_all_ranks(mine)), "")


def problems(trainer: Trainer, folder: Path) -> Iterator[str]:
    """What is missing from a checkpoint or damaged, as far as the formats let one see."""
    needed = UNDER_DEEPSPEED if trainer.is_deepspeed_enabled else NEEDED
    if trainer.accelerator.scaler is not None:
        needed = {**needed, "scaler.pt": ("scaler.pt",)}
    loads: Any = Trainer._load_from_checkpoint  # a class with its own knows where weights are
    own = getattr(type(trainer), loads.__name__, loads) is not loads
    for name, patterns in needed.items():
        if not (own and name == WEIGHTS) and not any(next(folder.glob(pattern), None) for pattern in patterns):
            yield f"{name} is missing"
    for part in sorted(folder.iterdir()):
        if part.is_dir() and part.name.startswith(SHARDED):
            yield from failure(part, check_sharded)
    read = (*ALSO_READ, *(pattern for patterns in needed.values() for pattern in patterns))
    for path in sorted({path for pattern in read for path in folder.glob(pattern)}):  # others may be of any kind
        if path.suffix in FORMATS and path.is_file():
            yield from failure(path, check_file)


def failure(path: Path, check: Any) -> Iterator[str]:
    try:
        check(path)
    except Exception as error:  # every format has errors of its own
        yield f"{path.name} is damaged ({error})"


def check_file(path: Path) -> None:
    """Raise an error if a file is cut off or, in the formats with check sums, altered."""
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        for shard in set(content.get("weight_map", {}).values()):
            (path.parent / shard).stat()
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    else:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
        if altered:
            raise ValueError(f"wrong check sum of {altered}")


def check_sharded(folder: Path) -> None:
    """Raise an error unless every piece of a `torch.distributed.checkpoint` folder is there in full length."""
    for piece in FileSystemReader(folder).read_metadata().storage_data.values():
        size = (folder / piece.relative_path).stat().st_size
        if size < piece.offset + piece.length:
            raise ValueError(f"{piece.relative_path} is cut off at {size} bytes")


def withdraw_checkpoint(trainer: Trainer) -> None:
    """Remove the last file of an older checkpoint that is about to be overwritten: a mixture must not look whole."""
    if trainer.args.should_save:
        folder = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
        (folder / STATE).unlink(missing_ok=True)
