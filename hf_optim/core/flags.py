# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Flags: techniques that any optimizer can switch on, each at its stage of the step.

The order of the stages is fixed, so a combination has one meaning everywhere:

    gradient -> update() with its ratio -> update -> decay -> step -> parameter

Within a stage the order is that of `hf_optim/transforms/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from .options import Option, collect, hp


if TYPE_CHECKING:
    from .base import Optimizer, Place

STAGES = ("gradient", "ratio", "update", "decay", "step", "parameter")
FLAGS: dict[str, dict[Any, type[Flag]]] = {}  # option name -> value of the option -> technique


class Flag:
    """One technique. Its annotated fields are options named `<flag>_<field>` (or as given); `apply` is pure.

    `apply(x, c)` receives the value of its stage (gradient; direction; old parameter; direction with its decay; new
    parameter) and a context `c` with the fields `g` (gradient), `p` (parameter before the step), `u` (the rule's own
    direction), `signs` (what has the signs of `u` and takes less to compute, at the update stage), `lr` (the step size
    really used), `s` (state), `h` (options and scalars) and `rule` (the optimizer's class). A decay flag returns what
    it adds to the direction. A ratio flag is `apply(num, den, h)`. State, scalars and sums start with the flag's name.
    """

    flag: ClassVar[str]  # the option that switches it on
    value: ClassVar[Any] = True  # the value of that option that means this technique
    stage: ClassVar[str]
    elementwise: ClassVar[bool] = True
    reads_gradient: ClassVar[bool] = False  # apply() looks at c.g, outside the gradient stage
    multiplies: ClassVar[str] = ""  # an option without which it does nothing
    sets: ClassVar[str] = ""  # what only one technique at a time can set
    options: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls) -> None:
        if cls.stage not in STAGES:
            raise TypeError(f"{cls.__name__}: `stage` must be one of {STAGES}, got {cls.stage!r}")
        cls.options = collect(cls)
        FLAGS.setdefault(cls.flag, {})[cls.value] = cls

    @classmethod
    def acts_at(cls, h: Any) -> str:
        """The stage, where an option chooses it."""
        return cls.stage

    @classmethod
    def excludes(cls, rule: type[Optimizer]) -> str:
        """Why the technique cannot act on an optimizer; empty if it can."""
        if cls.flag == "denominator" and not rule.uses_ratio:
            return "it has no ratio"
        if cls.flag == "decay" and rule.applies_decay:
            return "it applies weight decay inside its own rule"
        return ""

    @staticmethod
    def refuses(h: Any) -> dict[str, str]:
        """Options that cannot act together with the technique, as [`Optimizer.refuses`]."""
        return {}

    @staticmethod
    def init(p: Any, h: Any) -> dict[str, Any]:
        """State of the technique, as [`Optimizer.init`]."""
        return {}

    @staticmethod
    def scalars(t: int, h: Any) -> dict[str, float]:
        """Host scalars of step `t`, as [`Optimizer.scalars`]."""
        return {}

    @staticmethod
    def sums(rule: type[Optimizer], h: Any) -> tuple[str, ...]:
        """Names of whole-model sums, as [`Optimizer.sums`]."""
        return ()

    @staticmethod
    def measure(c: Any) -> dict[str, Any]:
        """This tensor's part of every sum, as [`Optimizer.measure`]."""
        raise NotImplementedError

    @staticmethod
    def options_for(at: Place, h: Any) -> dict[str, Any]:
        """Options that a parameter gets from its place in the model, as [`Optimizer.options_for`]."""
        return {}


DEFAULTS = {"denominator": "eps", "decay": "decoupled"}  # one of several; every other flag is off by default


def techniques(name: str, rule: type[Optimizer]) -> dict[Any, type[Flag]]:
    """What a flag can be set to on an optimizer, without its being off."""
    return {value: flag for value, flag in FLAGS[name].items() if not flag.excludes(rule)}


def switch(name: str, members: Mapping[Any, type[Flag]]) -> Option:
    """The option that selects one of these techniques."""
    doc = "; ".join((m.__doc__ or "").split("\n")[0].rstrip(".") for m in members.values())
    if name in DEFAULTS:
        choice = hp(DEFAULTS[name], doc, choices=tuple(members))
        return Option(**{**vars(choice), "name": name, "type": str})
    return Option(default=False, doc=doc, name=name, type=bool)


def chosen(values: Mapping[str, Any], names: tuple[str, ...]) -> tuple[type[Flag], ...]:
    """The techniques that `values` switches on, in the order of their registration."""
    on = {name: values[name] for name in FLAGS if name in names and isinstance(values[name], (str, bool))}
    return tuple(FLAGS[name][value] for name, value in on.items() if value in FLAGS[name])
