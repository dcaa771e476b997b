# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How a run is distributed, read from TrainingArguments, from what `accelerate launch` leaves in the environment, or
from a config file of accelerate; and the refusal of optimizers that would be wrong there."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..registry import OptimInfo
from ..verdicts import TITLES, Layout, decide


logger = logging.getLogger(__name__)

PRECISION = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`; arguments go before it
SECTION = (
    "the `optimizer` section of the DeepSpeed config takes the place of `--optim`; remove the section (a `scheduler` "
    "may stay)"
)
SWAP = (
    "with `offload_optimizer` accelerate puts DeepSpeedCPUAdam in its place; set "
    '`"zero_force_ds_cpu_optimizer": false` at the top level of the DeepSpeed JSON file, given by `--deepspeed FILE` '
    "or as `deepspeed_config_file` in the accelerate config (whose own keys cannot say it), or do not offload"
)


def refuse(info: OptimInfo, options: Mapping[str, Any], layout: Layout) -> None:
    """Stop a run whose optimizer would silently be another one.

    Raises:
        `ValueError`: with the reason and what to use instead.
    """
    verdict = decide(info.cls, options, layout)
    if not verdict.fine:
        raise ValueError(f"{info.name} cannot be used under {TITLES[layout.kind]}: {verdict.reason}")


def check_ranks(args: Any) -> None:
    """Look whether the processes that were launched train together, as they were told to.

    Raises:
        `ValueError`: if each of them would train a model of its own.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and started > 1 and args.world_size == 1:  # what torchrun and accelerate leave
        raise ValueError(
            f"{started} processes were launched, but each would train alone: accelerate found no accelerator to "
            "connect them on. On CPUs pass `--use_cpu` to the script (`use_cpu=True` in TrainingArguments), so that "
            "they meet over gloo, or launch one process"
        )
    kind = getattr(args.distributed_state, "distributed_type", None)
    if kind == "MULTI_CPU" and (args.fsdp_plugin_args or _on("ACCELERATE_USE_FSDP")):
        logger.warning("accelerate leaves FSDP out on CPUs: the model is not sharded, the run is DDP")


def of_deepspeed(config: Mapping[str, Any]) -> Layout:
    """The layout of a DeepSpeed config whose "auto" values are filled in."""
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    sliced = int(config.get("tensor_parallel", {}).get("autotp_size", 1)) > 1
    kind = f"zero{stage}" if stage else "tp" if sliced else "ddp"
    offload = (zero.get("offload_optimizer") or {}).get("device") not in (None, "none")
    swap = SWAP if offload and config.get("zero_force_ds_cpu_optimizer", True) else ""
    return Layout(kind, SECTION if "optimizer" in config else swap, offload)


def of_arguments(args: Any, model: Any) -> Layout:
    """The layout of a Trainer run.

    Args:
        args ([`~transformers.TrainingArguments`]): those of the run.
        model (`torch.nn.Module`, *optional*): what is trained; it may have been sharded while it was loaded.
    """
    if args.deepspeed_plugin is not None:
        return of_deepspeed(args.deepspeed_plugin.deepspeed_config)
    env = os.environ
    sizes = [getattr(model, "tp_size", None), getattr(getattr(args, "parallelism_config", None), "tp_size", None)]
    if _on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes.append(int(env.get("PARALLELISM_CONFIG_TP_SIZE", 1)))
    fsdp, offload = args.fsdp_plugin_args, False
    if any(size and size > 1 for size in sizes):
        kind = "tp"
    elif fsdp:
        kind, offload = f"fsdp{fsdp.get('fsdp_version', 1)}", bool(fsdp.get("cpu_offload"))
    elif _on("ACCELERATE_USE_FSDP"):
        kind, offload = f"fsdp{env.get('FSDP_VERSION', '1')}", _on("FSDP_OFFLOAD_PARAMS")
    else:
        kind = "ddp" if int(env.get("WORLD_SIZE", 1)) > 1 else "single"
    return Layout(kind, offload=offload, fp16=args.fp16 or (not args.bf16 and env.get(PRECISION) == "fp16"))


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "y", "on")


def of_accelerate(file: str) -> Layout:
    """The layout that `accelerate launch --config_file FILE` starts.

    Raises:
        `ValueError`: if the file is not a config of accelerate, or names a layout that nothing is known about.
        `OSError`: if it cannot be read.
    """
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(file)
    if not isinstance(config, ClusterConfig):
        raise ValueError("only local configs can be judged, not those of SageMaker")
    name = config.distributed_type.value
    if name == "DEEPSPEED":
        return of_deepspeed(_filled(config.deepspeed_config))
    offload = False
    if int(config.parallelism_config.get("parallelism_config_tp_size", 1)) > 1:
        kind = "tp"
    elif name == "FSDP":
        fsdp = config.fsdp_config
        kind, offload = f"fsdp{fsdp.get('fsdp_version', 1)}", str(fsdp.get("fsdp_offload_params")).lower() == "true"
    elif name == "NO":
        kind = "single"
    elif name.startswith("MULTI_"):
        kind = "ddp"
    else:
        raise ValueError(f"`distributed_type: {name}` cannot be judged; known are NO, MULTI_*, FSDP and DEEPSPEED")
    return Layout(kind, offload=offload, fp16=config.mixed_precision == "fp16")


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config that accelerate makes of its own keys, or of the file they name."""
    from accelerate.utils import DeepSpeedPlugin

    known = {f.name for f in fields(DeepSpeedPlugin)}
    given = {key: value for key, value in config.items() if key in known}
    if "deepspeed_config_file" in config:
        given = {"hf_ds_config": config["deepspeed_config_file"]}
    return DeepSpeedPlugin(**given).deepspeed_config


def guard_optimizer_section(handled: Mapping[str, OptimInfo]) -> None:
    """Trainer makes no optimizer where the DeepSpeed config has one of its own: the name would be ignored in silence.

    Args:
        handled: what each value of `--optim` stands for.
    """
    from transformers.integrations import deepspeed

    original = deepspeed.deepspeed_optim_sched

    @functools.wraps(original)
    def deepspeed_optim_sched(trainer: Any, hf_deepspeed_config: Any, args: Any, *rest: Any) -> Any:
        info = handled.get(str(getattr(args.optim, "value", args.optim)))
        if info is not None and "optimizer" in hf_deepspeed_config.config:
            refuse(info, info.preset, of_deepspeed(hf_deepspeed_config.config))
        return original(trainer, hf_deepspeed_config, args, *rest)

    deepspeed.deepspeed_optim_sched = deepspeed_optim_sched
