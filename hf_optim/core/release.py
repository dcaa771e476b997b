# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient release: the step of each parameter runs in backward, so gradients never exist all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharding
from .plan import Call, kind, make_item


if TYPE_CHECKING:
    from .base import Optimizer


class Release:
    """Handle of the hooks that step parameters as their gradients arrive; `remove()` takes them away."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scalars: list[dict[str, Tensor]] | None = None  # of the step that backward is in the middle of
        self.used: list[Any] = []
        self._refuse()
        self.handles = []
        index = 0
        for position, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    self.handles.append(p.register_post_accumulate_grad_hook(self._hook(position, index)))
                index += 1

    def _refuse(self) -> None:
        owner = type(self.optimizer).__name__
        for group in self.optimizer.param_groups:
            needs = self.optimizer.all_sums(group)
            if needs:
                raise ValueError(f"{owner}: {', '.join(needs)} needs all gradients at once; drop gradient release")
        if sharding.several_ranks() and not all(sharding.is_sharded(p) for p in self.optimizer.parameters()):
            raise ValueError(
                f"{owner}: under DDP a gradient is averaged after the hook that would use it; use FSDP2 (and call "
                "release_gradients after fully_shard), or drop gradient release"
            )

    def _hook(self, position: int, index: int) -> Any:
        seen: list[Any] = [None]  # the window in which this parameter was last stepped

        def hook(p: Tensor) -> None:
            if p.grad is None:
                return
            with torch.no_grad():
                if self.scalars is None:
                    self.optimizer._materialize()
                    self.scalars = self.optimizer._begin()
                    self.used = []
                if seen[0] is self.scalars:
                    raise RuntimeError(
                        f"{type(self.optimizer).__name__}: a second gradient arrived before step(). Gradient release "
                        "cannot accumulate gradients, nor run with reentrant checkpointing: call step() after every "
                        "backward(), and use `use_reentrant=False`"
                    )
                seen[0] = self.scalars
                self._step(position, p, index)
                p.grad = None

        return hook

    def _step(self, position: int, p: Tensor, index: int) -> None:
        if not p.numel():
            return
        assert self.scalars is not None
        group = self.optimizer.param_groups[position]
        spec = self.optimizer.spec(group, p, self.scalars[position])
        item = make_item(spec, p, self.optimizer.state[p], index)
        call = Call(position, group, spec, kind(spec, item), [item])
        self.optimizer._run([call], self.scalars, item.weight.numel())
        self.used += self.optimizer._used

    def finish(self) -> None:
        """`step()` closes the window: the next gradient belongs to the next step."""
        if self.scalars is None:
            return
        self.optimizer._used, self.scalars = self.used, None
        if any(p.grad is not None for p in self.optimizer.parameters()):
            raise RuntimeError(
                f"{type(self.optimizer).__name__}: a parameter that was frozen when gradients were released has one "
                "now; remove() the release and call release_gradients() again after unfreezing"
            )

    def remove(self) -> None:
        """Back to ordinary steps."""
        for handle in self.handles:
            handle.remove()
        self.optimizer._release = None
