# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Flags: techniques that any optimizer can switch on, each at its stage of the step.

The order of the stages is fixed, so a combination has one meaning everywhere:

    gradient -> update() with its ratio -> update -> decay -> parameter
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .options import Option, collect, hp


STAGES = ("gradient", "ratio", "update", "decay", "parameter")
FLAGS: dict[str, dict[Any, type[Flag]]] = {}  # option name -> value of the option -> technique


class Flag:
    """One technique. Its annotated fields are options named `<flag>_<field>` (or as given); `apply` is pure.

    `apply(x, c)` receives the value of its stage (gradient, direction, old parameter, new parameter) and a context `c`
    with the fields `g` (gradient), `p` (parameter before the step), `u` (the rule's own direction), `lr` (the step
    size really used), `s` (state) and `h` (options and scalars). A decay flag returns what it adds to the direction.
    A ratio flag is `apply(num, den, h)`.
    """

    flag: ClassVar[str]  # the option that switches it on
    value: ClassVar[Any] = True  # the value of that option that means this technique
    stage: ClassVar[str]
    elementwise: ClassVar[bool] = True
    options: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls) -> None:
        if cls.stage not in STAGES:
            raise TypeError(f"{cls.__name__}: `stage` must be one of {STAGES}, got {cls.stage!r}")
        cls.options = collect(cls)
        FLAGS.setdefault(cls.flag, {})[cls.value] = cls

    @staticmethod
    def init(p: Any, h: Any) -> dict[str, Any]:
        """State of the technique, as [`Optimizer.init`]; names must start with the flag's."""
        return {}

    @staticmethod
    def scalars(t: int, h: Any) -> dict[str, float]:
        """Host scalars of step `t`, as [`Optimizer.scalars`]."""
        return {}


DEFAULTS = {"denominator": "eps", "decay": "decoupled"}  # one of several; every other flag is off by default


def switch(name: str) -> Option:
    """The option that selects a flag, made from the techniques registered under it."""
    members = FLAGS[name]
    doc = "; ".join((m.__doc__ or "").split("\n")[0].rstrip(".") for m in members.values())
    if name in DEFAULTS:
        choice = hp(DEFAULTS[name], doc, choices=tuple(members))
        return Option(**{**vars(choice), "name": name, "type": str})
    return Option(default=False, doc=doc, name=name, type=bool)


def chosen(values: Mapping[str, Any], names: tuple[str, ...]) -> tuple[type[Flag], ...]:
    """The techniques that `values` switches on, in stage order."""
    picked = [FLAGS[name][values[name]] for name in FLAGS if name in names and values[name] in FLAGS[name]]
    return tuple(sorted(picked, key=lambda f: STAGES.index(f.stage)))
