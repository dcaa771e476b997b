# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every registered name as a `Trainer` choice: the enum, the handlers, `--optim_args`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, trainer_optimizer
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists
from transformers.training_args import OptimizerNames

from .. import registry
from ..core.options import nearest
from ..optim_args import split_optim_args
from ..registry import OptimInfo
from . import layout, release


logger = logging.getLogger(__name__)

_creating: ContextVar[Trainer | None] = ContextVar("_creating", default=None)  # whose optimizer is being made
HANDLED: dict[str, OptimInfo] = {}  # value of --optim -> what it resolves to
TRAINER_OPTIONS = {"lr": "learning_rate", "weight_decay": "weight_decay"}  # Trainer sets these itself


def register_names(replace: tuple[str, ...] = ()) -> None:
    """Add every name of the registry to transformers' choices; idempotent.

    Args:
        replace (`tuple[str]`, *optional*): built-in names that shall resolve to `<name>_corrected`.

    Raises:
        `ValueError`: if a name in `replace` is not built in or has no corrected version.
    """
    _patch_once()
    for name in registry.list_optimizers():
        _add_name(name, registry.info(name))
    for name in replace:
        corrected = f"{name}_corrected"
        if corrected not in registry.REGISTRY or name not in OptimizerNames._value2member_map_:
            raise ValueError(f"`replace` takes built-in names that have a corrected version, got {name!r}")
        _handle(name, registry.info(corrected))


def _add_name(name: str, info: OptimInfo) -> None:
    if name in OptimizerNames._value2member_map_ and name not in HANDLED:
        ours = f"hfo_{name}"
        if ours not in HANDLED:
            logger.info("transformers has a %r of its own; ours answers to %r", name, ours)
        name = ours
    if name not in OptimizerNames._value2member_map_:
        _extend_enum(OptimizerNames, name.upper(), name)
    _handle(name, info)


def _handle(name: str, info: OptimInfo) -> None:
    HANDLED[name] = info
    trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] = lambda ctx: resolve(info, ctx.args, ctx.model)


def _extend_enum(enum: Any, member_name: str, value: str) -> None:
    """A new member, in the four places where Enum keeps them (a fifth since Python 3.13)."""
    member = str.__new__(enum, value)
    member._name_, member._value_ = member_name, value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, member_name, member)
    enum._member_map_[member_name] = member
    enum._value2member_map_[value] = member
    enum._member_names_.append(member_name)
    if hasattr(enum, "_hashable_values_"):
        enum._hashable_values_.append(value)


def _patch_once() -> None:
    """Trainer splits `--optim_args` before it looks for a handler, and fails on commas and quotes: go first."""
    original: Callable[..., Any] = Trainer.get_optimizer_cls_and_kwargs
    if getattr(original, "_hf_optim", False):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        info = HANDLED.get(str(getattr(args.optim, "value", args.optim)))
        return original(args, model) if info is None else resolve(info, args, model)

    get_optimizer_cls_and_kwargs._hf_optim = True  # type: ignore[attr-defined]
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)  # type: ignore[method-assign]

    create: Callable[..., Any] = Trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        token = _creating.set(self)
        try:
            return create(self, *args, **kwargs)
        finally:
            _creating.reset(token)

    Trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]

    def missing(cls: Any, value: Any) -> Any:
        known = list(cls._value2member_map_)
        raise ValueError(f"{value!r} is not a valid `optim`{nearest(str(value), known)} Choose one of {known}")

    OptimizerNames._missing_ = classmethod(missing)  # type: ignore[method-assign, assignment]
    layout.guard_optimizer_section(HANDLED)


def resolve(info: OptimInfo, args: TrainingArguments, model: torch.nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """The class and keyword arguments for a run.

    A value comes from, last wins: the class, the preset of the name, a `TrainingArguments` field that the user
    changed, `--optim_args`. Groups are Trainer's own, unless the optimizer wants to know the kind of the modules.

    Raises:
        `ValueError`, `TypeError`: for a bad `--optim_args`; the message names option, value and range.
        `ValueError`: if the optimizer would be wrong on the parts of tensors that this run gives it, or cannot step
            inside backward as `gradient_release=true` asks for; or if launched processes would train alone.
    """
    given = {"lr": args.learning_rate, **_changed_fields(info, args), **parse_optim_args(info, args.optim_args)}
    options = info.cls.with_preset(info.preset, given)
    layout.check_ranks(args)
    layout.refuse(info, options, layout.of_arguments(args, model))
    release.refuse(info, options, args)
    _warn_lr(info, args)
    if args.optim_target_modules is not None and not info.cls.uses_targets:
        logger.warning("`optim_target_modules` has no effect with %s", info.name)
    if model is None or not info.cls.asks_for_place(options):
        return info.cls, options
    names: Any = Trainer.get_decay_parameter_names  # does not look at self; but a subclass may have its own
    trainer = _creating.get()
    decay = set(names(None, model) if trainer is None else trainer.get_decay_parameter_names(model))
    options["weight_decay"] = args.weight_decay
    groups, options = registry.param_groups(info.cls, model, options, decay, _target(args))
    return info.cls, {**options, "params": groups}


def _target(args: TrainingArguments) -> Callable[[str, torch.nn.Module], bool] | None:
    """What `optim_target_modules` matches: a regular expression, a list of names, or "all-linear"."""
    wanted = args.optim_target_modules
    if wanted is None:
        return None
    if isinstance(wanted, str) and wanted.replace("_", "-") == "all-linear":
        return lambda name, module: isinstance(module, (torch.nn.Linear, Conv1D))
    return lambda name, module: bool(check_target_module_exists(wanted, name))


def parse_optim_args(info: OptimInfo, text: str | None) -> dict[str, Any]:
    """The options in the value of `--optim_args`, checked one by one."""
    table, owner = info.options, info.name
    raw = split_optim_args(text)
    parsed = {}
    for key, value in raw.items():
        field = TRAINER_OPTIONS.get(key) or (key if key == "learning_rate" else None)
        if field is not None:
            raise ValueError(f"{owner}: `{key}` does not belong in `--optim_args`; use `--{field}`")
        if key not in table or info.cls.excluded(key, value):
            raise info.cls.unknown_option(key, value)
        parsed[key] = table[key].parse(owner, value)
    return parsed


def _changed_fields(info: OptimInfo, args: TrainingArguments) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    return {
        option: getattr(args, name) for option, name in info.from_args.items() if getattr(args, name) != defaults[name]
    }


def _warn_lr(info: OptimInfo, args: TrainingArguments) -> None:
    untouched = next(f.default for f in fields(TrainingArguments) if f.name == "learning_rate")
    if info.lr and args.learning_rate == untouched and 10 * untouched < info.lr[0]:  # no longer run makes up for that
        logger.warning(
            "`learning_rate` is transformers' default %g, with which %s hardly trains; start from %g (%s)",
            untouched, info.name, info.lr[1], info.lr_source,
        )  # fmt: skip
