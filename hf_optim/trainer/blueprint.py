# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A model from its config alone, on the meta device: every shape and dtype, no weight."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from ..core.options import nearest
from ..optim_args import split_optim_args


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LORA = ("r", "target_modules", "modules_to_save")  # what decides how large the adapters are


def from_config(source: str, dtype: str | None = None) -> PreTrainedModel:
    """The model of a config file, a folder that has one, or a name of the Hub.

    Its class is the first architecture that the config names, else the causal language model of its type.

    Args:
        dtype (`str`, *optional*): a key of `DTYPES`; that of the config (fp32 where it says nothing) by default.

    Raises:
        `ValueError`: if it cannot be built.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no config of transformers at {source!r}: {reason} Give a config.json, a folder with one, or the name of "
            "a model on the Hub"
        ) from None
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source}: the weights are quantized, and only the library that does it knows their size")
    loaded = DTYPES[dtype] if dtype else getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            return _as_loaded(_built(config, loaded), loaded)
    except Exception as error:  # a config can be wrong in any way that its modelling code can stumble over
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source}: the model cannot be built from its config: {reason}") from error


def _built(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    for cls in filter(None, named):
        return cls._from_config(config, dtype=dtype)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    return auto.from_config(config, dtype=dtype)


def _as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """What `from_pretrained` does beyond that: weights that are to stay in fp32 do, and every weight trains."""
    kept = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())] if dtype != torch.float32 else []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, p in model.named_parameters():
        if any(re.search(key.replace("*", ".*"), name) for key in kept):
            p.data = p.data.float()
        p.requires_grad_(p.is_floating_point())
    return model


def with_lora(model: PreTrainedModel, text: str) -> torch.nn.Module:
    """The model with peft's LoRA adapters, which alone are trained.

    Args:
        text (`str`): as `--optim_args`: `r=16`, `r=16,target_modules=all-linear`, `target_modules=[q_proj,v_proj]`.

    Raises:
        `ImportError`: without peft.
        `ValueError`: for what peft does not take.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("`--lora` needs peft: pip install peft") from None
    given = split_optim_args(text)
    for name in given:
        if name not in LORA:
            raise ValueError(f"`lora`: unknown option `{name}`{nearest(name, LORA)} Options: {', '.join(LORA)}.")
    try:
        options = {name: _value(name, value) for name, value in given.items()}
        with torch.device("meta"):
            return get_peft_model(model, LoraConfig(**options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`lora={text}`: {error}") from None


def _value(name: str, value: Any) -> Any:
    if name == "r":
        return int(value)
    if isinstance(value, str) and (value.startswith("[") or name == "modules_to_save"):
        return [word.strip() for word in value.strip("[]").split(",")]  # `target_modules` may be a pattern
    return value
