# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient release: the step of each parameter runs in backward, so gradients never exist all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import execute, sharding
from .flags import chosen
from .pipeline import Spec, View, absorb_tensor
from .plan import Call, Item, make_item, watch


if TYPE_CHECKING:
    from .base import Optimizer


@dataclass
class Part:
    """A parameter with a hook, and what is kept of its last step."""

    p: Tensor
    position: int  # of its group
    index: int
    item: tuple[Spec, Item] | None = None  # the spec lacks the scalars of a step
    unchanged: Callable[[], bool] = bool  # never yet
    call: Call | None = None
    window: Any = None  # the step that it took part in last
    absorbed: int = 0  # gradients that its state has taken since


class Release:
    """Handle of the hooks that step parameters as their gradients arrive; `remove()` takes them away.

        handle = optimizer.release_gradients()
        for micro_batch in all but the last:
            with handle.accumulate():
                loss(micro_batch).backward()
        loss(last).backward()
        optimizer.step()

    A window is what belongs to one step: it ends with `step()`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scalars: list[dict[str, Tensor]] | None = None  # of the step that backward is in the middle of
        self.values: dict[Any, dict[str, Any]] = {}  # what its tensors share
        self.used: list[Any] = []
        self.options: list[Any] = []  # that the kept calls were made for
        self.absorbing = self.skipping = self.checked = False
        self._refuse()
        self.parts = [Part(p, position, i) for i, (p, position) in enumerate(optimizer.placed()) if p.requires_grad]
        self.numel = sum(part.p.numel() for part in self.parts)
        self.handles = [part.p.register_post_accumulate_grad_hook(self._hook(part)) for part in self.parts]

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

    # ---- one gradient ----------------------------------------------------------------------------------------------
    def _hook(self, part: Part) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if p.grad is not None and not self.skipping:
                with torch.no_grad(), self.optimizer._plainly():
                    self._absorb(part) if self.absorbing else self._step(part)
            p.grad = None

        return hook

    def _step(self, part: Part) -> None:
        scalars = self._open() if self.scalars is None else self.scalars
        if part.window is scalars:
            raise RuntimeError(
                f"{type(self.optimizer).__name__}: a second gradient arrived before step(). Gradient release cannot "
                "accumulate gradients unasked, nor run with reentrant checkpointing: call step() after every "
                "backward(), or put the backward() of all micro-batches but the last inside `with "
                "handle.accumulate():`; and use `use_reentrant=False`"
            )
        part.window, part.absorbed = scalars, 0
        if part.p.numel():
            call = self._call(part, scalars)
            key = (call.position, call.t, call.items[0].weight.device)
            if key not in self.values:
                self.values[key] = self.optimizer._values(call, scalars)
            self.used += self.optimizer._run_call(call, self.values[key], self.numel)
            torch.autograd.graph.increment_version(part.p)  # where backward still needs it as it was: an error, then

    def _absorb(self, part: Part) -> None:
        part.absorbed += 1
        if not part.p.numel():
            return
        spec, item = self._item(part)
        call = Call(part.position, self.optimizer.param_groups[part.position], spec, [item])
        t = call.t + 1
        h = spec.hyper(self.optimizer._host_scalars(call.group, tuple(flag for flag, _ in spec.flags), t))
        ((salt, offset),) = execute.salts(call, call.group["seed"], t)
        absorb_tensor(spec, item.gradient(spec.elementwise), item.bufs, h, salt, offset, part.absorbed)

    # ---- what is kept from step to step ----------------------------------------------------------------------------
    def _open(self) -> list[dict[str, Tensor]]:
        self.optimizer._materialize()
        self.scalars, self.used = self.optimizer._begin(), []
        self._refresh()
        return self.scalars

    def _refresh(self) -> None:
        """Forget the values of the last window, and calls that were made for other options."""
        self.values = {}
        static = self.optimizer.static_options()
        options = [(id(group), [v for k, v in group.items() if k in static]) for group in self.optimizer.param_groups]
        if options != self.options:
            self.options, self.checked = options, False
            for part in self.parts:
                part.item = part.call = None

    def _item(self, part: Part) -> tuple[Spec, Item]:
        optimizer, state = self.optimizer, self.optimizer.state[part.p]
        if part.item is None or part.item[1].state is not state or not part.unchanged():
            spec = optimizer.spec(optimizer.param_groups[part.position], part.p, {})
            item = make_item(spec, part.p, state, part.index)
            part.item, part.unchanged, part.call = (spec, item), watch([item]), None
        return part.item

    def _call(self, part: Part, scalars: list[dict[str, Tensor]]) -> Call:
        _, item = self._item(part)
        if part.call is None:
            group = self.optimizer.param_groups[part.position]
            spec = self.optimizer.spec(group, part.p, scalars[part.position])
            part.call = Call(part.position, group, spec, [item])
        return part.call

    # ---- windows ---------------------------------------------------------------------------------------------------
    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around the backward of every micro-batch of a step but the last: gradients join the state, nothing moves.

        Raises:
            `ValueError`: if the optimizer does more with a gradient than average it.
            `RuntimeError`: if the last micro-batch of this step has been already.
        """
        self._refresh()
        if not self.checked:
            self._refuse_accumulation()
            self.checked = True
        if self.scalars is not None:
            raise RuntimeError(
                f"{type(self.optimizer).__name__}: the parameters have moved since the last step(): call step() "
                "before the micro-batches of the next step"
            )
        with torch.no_grad():
            self.optimizer._materialize()
        self.absorbing = True
        try:
            yield
        finally:
            self.absorbing = False

    def _refuse_accumulation(self) -> None:
        for group in self.optimizer.param_groups:
            reason = cannot_absorb(type(self.optimizer), group)
            if reason:
                raise ValueError(
                    f"{type(self.optimizer).__name__} cannot accumulate gradients while it releases them: {reason}. "
                    f"{', '.join(able())} can; else call step() after every backward(), or drop gradient release"
                )

    def skip(self) -> None:
        """Throw away the gradients of the rest of this window: nothing moves until the `step()` after it."""
        self.skipping = True

    def finish(self) -> None:
        """`step()` closes the window: the next gradient belongs to the next step."""
        if not self.skipping:
            for part in self.parts:
                if part.absorbed:  # by earlier micro-batches; it had no gradient in the last
                    part.p.grad = torch.zeros_like(part.p, dtype=getattr(part.p, "grad_dtype", None))
                    with self.optimizer._plainly():
                        self._step(part)
                    part.p.grad = None
            if self.scalars is not None:
                self.optimizer._used = self.used
        self.forget()

    def forget(self) -> None:
        """Back to between two steps."""
        self.scalars, self.skipping = None, False
        for part in self.parts:
            part.absorbed = 0

    def remove(self) -> None:
        """Back to ordinary steps."""
        for handle in self.handles:
            handle.remove()
        for group in self.optimizer.param_groups:
            group["gradient_release"] = False
        self.optimizer._release = None


# ---- what is refused ------------------------------------------------------------------------------------------------
def refuse_gradients(optimizer: Optimizer) -> None:
    """Raise where `step()` finds a gradient that should have been released."""
    owner = type(optimizer).__name__
    if optimizer._release is not None:
        raise RuntimeError(
            f"{owner}: a parameter that was frozen (or another tensor) when gradients were released has one now; "
            "remove() the release and call release_gradients() again, after unfreezing or sharding"
        )
    if optimizer.param_groups[0]["gradient_release"]:
        raise RuntimeError(
            f"{owner}: `gradient_release=true`, but nobody took the gradients in backward. In a Trainer use "
            "`hf_optim.LossAwareTrainer` (or `class T(LossAwareMixin, YourTrainer)`), or start the unmodified script "
            "with `hf-optim run SCRIPT ...`; in your own loop call `optimizer.release_gradients()` before backward()"
        )


def cannot_absorb(cls: type[Optimizer], options: Mapping[str, Any]) -> str:
    """Why the state of an optimizer cannot take the gradients of micro-batches one by one; empty if it can."""
    values = {"schedule": 1.0, **cls.completed(options)}
    h = View(values | cls.scalars(1, View(values)))
    for flag in chosen(values, cls.flags()):
        if flag.reads_gradient or flag.acts_at(h) == "gradient":
            return f"`{flag.flag}={flag.value}` looks at the gradient of the whole step"
    averages = cls.averages(h)
    if not averages:
        return f"{cls.__name__} makes more of the gradient of a step than an average"
    if not all(decay for decay, _ in averages.values()):
        return f"the average of {cls.__name__} has a decay of 0 and keeps nothing of an earlier micro-batch"
    return ""


def able() -> list[str]:
    """Names of the classes that can, with their default options."""
    from .base import Optimizer

    classes: list[type[Optimizer]] = [Optimizer]
    for cls in classes:
        classes += cls.__subclasses__()
    return sorted({cls.__name__ for cls in classes if not cannot_absorb(cls, {})})
