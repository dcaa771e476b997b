# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters declared once: constructor checks, `--optim_args` parsing and every error text come from `hp()`."""

from __future__ import annotations

import difflib
import math
import operator
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


def hp(default: Any, doc: str, **limits: Any) -> Any:
    """Declare an option of an optimizer or a flag: its default, one line of documentation and its limits.

    Used as the value of an annotated class field; the annotation (`float`, `int`, `bool`, `str`, or one of them
    `| None`) is the type. Bounds are closed (`ge`, `le`) or open (`gt`, `lt`); `choices` lists the values there are;
    a string with `patterns=True` gives numbers to parameters by their names, see [`by_pattern`].
    """
    return Option(default, doc, **limits)


@dataclass(frozen=True)
class Option:
    """One option as declared by [`hp`]; `name` and `type` are filled in from the class body."""

    default: Any
    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    patterns: bool = False
    name: str = ""
    type: type = float
    optional: bool = False

    @property
    def range(self) -> str:
        """What the option accepts, as it reads in an error: `a float in [0, 1)`, `one of 'a', 'b'`."""
        if self.choices:
            kind = "one of " + ", ".join(repr(c) for c in self.choices)
        elif self.patterns:
            kind = "a string `pattern:number;pattern:number`"
        else:
            kind = {"int": "an int", "str": "a string", "bool": "True or False"}.get(self.type.__name__, "a float")
            low = f"[{self.ge:g}" if self.ge is not None else f"({self.gt:g}" if self.gt is not None else "(-inf"
            high = f"{self.le:g}]" if self.le is not None else f"{self.lt:g})" if self.lt is not None else "inf)"
            if (low, high) != ("(-inf", "inf)"):
                kind += f" in {low}, {high}"
        return kind + (" or None" if self.optional else "")

    def check(self, owner: str, value: Any) -> Any:
        """Return `value` as plain Python data (what a checkpoint can hold).

        Raises:
            `TypeError`: if `value` has the wrong type.
            `ValueError`: if it is not finite, out of range or not one of the choices.
        """
        if value is None and self.optional:
            return None
        problem = f"{owner}: `{self.name}` must be {self.range}, got {value!r}"
        value = self._plain(value, problem)
        if self.choices and value not in self.choices:
            raise ValueError(problem)
        if self.patterns:
            try:
                read_patterns(value)
            except (ValueError, re.error) as error:
                raise ValueError(f"{problem} ({error})") from None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            bounds = [(self.ge, operator.ge), (self.gt, operator.gt), (self.le, operator.le), (self.lt, operator.lt)]
            inside = all(bound is None or holds(value, bound) for bound, holds in bounds)
            if not inside or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(problem)
        return value

    def _plain(self, value: Any, problem: str) -> Any:
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        if hasattr(value, "dtype") and hasattr(value, "item"):  # numpy scalars save but do not load with weights_only
            if (value.numel() if isinstance(value, torch.Tensor) else value.size) != 1:
                raise ValueError(f"{problem} (a tensor or array must hold one element)")
            value = value.item()
        wanted: tuple[type, ...] = (int, float) if self.type is float else (self.type,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.type is not bool):
            raise TypeError(f"{problem} ({type(value).__name__})")
        try:
            return self.type(value)
        except OverflowError:  # an int that no float can hold
            raise ValueError(problem) from None

    def parse(self, owner: str, text: Any) -> Any:
        """Read the option from a command line or YAML value and check it. Non-strings are checked as they are."""
        if not isinstance(text, str):
            return self.check(owner, text)
        word = text.strip()
        if self.optional and word.lower() in ("none", "null"):
            return None
        truths = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        try:
            value = truths[word.lower()] if self.type is bool else self.type(word)
        except (KeyError, ValueError):
            raise ValueError(f"{owner}: `{self.name}` must be {self.range}, got {text!r}") from None
        return self.check(owner, value)


def collect(cls: type) -> dict[str, Option]:
    """The options declared in the body of `cls` and of its bases, bases first."""
    found: dict[str, Option] = {}
    for base in reversed(cls.__mro__):
        hints = typing.get_type_hints(base) if any(isinstance(v, Option) for v in vars(base).values()) else {}
        for name, value in vars(base).items():
            if isinstance(value, Option):
                kinds = typing.get_args(hints[name]) or (hints[name],)  # of `float | None`, or of `float`
                kind = next(k for k in kinds if k is not type(None))
                found[name] = replace(value, name=name, type=kind, optional=type(None) in kinds)
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'beta1'?` or nothing."""
    match = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(m) for m in match)}?" if match else ""


def unknown(owner: str, key: str, known: Collection[str]) -> TypeError:
    """The error for an option that `owner` does not have."""
    return TypeError(f"{owner}: unknown option `{key}`{nearest(key, known)} Options: {', '.join(known)}.")


def parse_options(owner: str, raw: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """Parse and check the values of `raw` against `options`.

    Raises:
        `TypeError`: for a name that is not in `options`; the message gives the nearest one and the list.
        `ValueError`: for a value out of range.
    """
    for key in raw:
        if key not in options:
            raise unknown(owner, key, options)
    return {key: options[key].parse(owner, value) for key, value in raw.items()}


def read_patterns(entries: str) -> list[tuple[re.Pattern[str], float]]:
    """The entries of a `;`-separated list of `pattern:number`, each a regular expression and its number."""
    pairs = [entry.rpartition(":") for entry in entries.split(";") if entry]
    if not all(pattern for pattern, _, _ in pairs):
        raise ValueError("an entry has no pattern")
    return [(re.compile(pattern), float(number)) for pattern, _, number in pairs]


def by_pattern(entries: str, name: str, default: float | None) -> float | None:
    """The number of the first `pattern:number` of a `;`-separated list whose pattern is found in `name`."""
    return next((number for pattern, number in read_patterns(entries) if pattern.search(name)), default)
