# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The value of `--optim_args`, split into names and values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def split_optim_args(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Split the value of `--optim_args` into names and (still unparsed) values.

    Accepts transformers' `k=v,k=v`, with commas allowed inside quotes and brackets and a trailing comma ignored, or a
    JSON object; and a mapping, as YAML files and Python have it.

    Raises:
        `ValueError`: if the text has neither form, or gives a name twice.
    """
    if isinstance(text, Mapping):
        return dict(text)
    text = (text or "").strip()
    if text.startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise ValueError(f"`optim_args` starts like a JSON object but is not one: {error}. Got {text!r}") from None
    pairs = []
    for part in _split_outside(text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ValueError(
                f"`optim_args` must look like 'name=value,name=value' (or be a JSON object); {part.strip()!r} is not "
                f"'name=value' in {text!r}"
            )
        pairs.append((name.strip(), value.strip().strip("\"'")))
    return _unique(pairs)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"`optim_args` gives `{name}` twice")
        seen[name] = value
    return seen


def _split_outside(text: str) -> list[str]:
    """Split at the commas that stand outside quotes and brackets; drop an empty last part."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
        if depth < 0:
            break
    parts.append(text[start:])
    if quote or depth:  # it would swallow the options after it
        raise ValueError(f"`optim_args`: a quote or bracket does not match in {parts[-1].strip()!r}; got {text!r}")
    if not parts[-1].strip():
        parts.pop()
    return parts
