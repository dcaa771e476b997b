# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The public base class. A paper says its options, `init`, `scalars` and `update`; the rest is here and beside it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import checkpoint, execute, plan, precision, sharding
from .flags import FLAGS, chosen, switch
from .options import Option, collect, hp, unknown
from .pipeline import KAHAN, Spec, View, measure_tensor
from .release import Release
from .sharding import Slot


logger = logging.getLogger(__name__)

DYNAMIC = ("lr", "weight_decay")  # change from step to step without recompiling
ENGINE = ("backend", "precision", "state_dtype", "seed")
TAGS = ("params", "param_names", "initial_lr", "name")  # group keys of torch, its schedulers and Lightning


class Optimizer(torch.optim.Optimizer):
    """Base class of every optimizer.

    Args:
        params (`Iterable`):
            Parameters, named parameters or groups, as for any `torch.optim.Optimizer`.
        lr (`float`, *optional*):
            Step size; the class has a default.
        options:
            The annotated fields of the class, the flags that apply to it, and the fields below. Each is checked, also
            per group.

    Raises:
        `TypeError`: for an unknown option (the message gives the nearest one) or a value of the wrong type.
        `ValueError`: for a value out of range, or an option that can have no effect with the others.
    """

    lr: float = hp(1e-3, "step size", ge=0)
    weight_decay: float = hp(0.0, "decay of the weights, multiplied by the step size", ge=0)
    backend: str = hp(
        "auto", "eager loop, or fused by torch.compile; auto compiles large models", choices=("auto", "loop", "fused")
    )
    precision: str = hp(
        "nearest", "how bf16 weights are rounded after a step", choices=("nearest", "stochastic", "kahan")
    )
    state_dtype: str = hp(
        "float32", "storage of parameter-sized state; bf16 is rounded stochastically", choices=("float32", "bfloat16")
    )
    seed: int = hp(0, "seed of stochastic rounding", ge=0)

    # ---- what one paper's file says ------------------------------------------------------------------------------
    elementwise: ClassVar[bool] = False  # no reductions: tensors may be seen flat and shard by shard
    needs_matrix: ClassVar[bool] = False  # the shape of the weight matters: meaningless on flat shards
    needs_loss: ClassVar[bool] = False  # prepare() reads h.loss
    uses_ratio: ClassVar[bool] = False  # update() ends in h.ratio(num, den), so `denominator` applies
    returns_lr: ClassVar[bool] = False  # update() returns (direction, step size)
    applies_decay: ClassVar[bool] = False  # update() applies h.weight_decay itself, so `decay` does not apply
    by_name: ClassVar[tuple[str, ...]] = ()  # options that options_for() turns into others, given parameter names
    shared: ClassVar[dict[str, float]] = {}  # optimizer-wide scalars and their first value, kept in every group

    @staticmethod
    def init(p: Tensor, h: Any) -> dict[str, Slot]:
        """State buffers of a parameter. Only the shape of `p` may be looked at."""
        raise NotImplementedError

    @staticmethod
    def update(g: Tensor, p: Tensor, s: Any, h: Any) -> Any:
        """The direction `u` of `p <- p - lr u`, or `(u, lr)`. Pure: `s.m = ...` is stored back by the engine."""
        raise NotImplementedError

    @staticmethod
    def scalars(t: int, h: Any) -> dict[str, float]:
        """Numbers that depend on the step `t` = 1, 2, ... of a parameter; they arrive in `update` as `h.<name>`."""
        return {}

    @staticmethod
    def prepare(s: Any, h: Any) -> dict[str, Tensor]:
        """Once per group and step, before any tensor: advances `shared` (`s`), returns 0-d tensors for `h.<name>`."""
        return {}

    @staticmethod
    def sums(h: Any) -> tuple[str, ...]:
        """Names of the whole-model sums that `measure` returns a part of for each tensor."""
        return ()

    @staticmethod
    def measure(g: Tensor, p: Tensor, s: Any, h: Any) -> dict[str, Tensor]:
        """This tensor's part of every sum; the totals over all tensors and ranks arrive as `h.<name>`."""
        raise NotImplementedError

    @staticmethod
    def refuses(h: Any) -> dict[str, str]:
        """Options that cannot act together with the others, each with the reason."""
        return {}

    @staticmethod
    def needs_whole(h: Any) -> str:
        """Why these options cannot work on a sharded parameter; empty if they can."""
        return ""

    @staticmethod
    def options_for(module: torch.nn.Module, name: str, p: Tensor, h: Any) -> dict[str, Any]:
        """Options that a parameter gets from the kind of its module; [`param_groups`] makes groups of them."""
        return {}

    # ---- options -------------------------------------------------------------------------------------------------
    @classmethod
    @functools.cache
    def flags(cls) -> tuple[str, ...]:
        """Names of the flags that can act on this optimizer, in stage order."""
        hidden = {"denominator": not cls.uses_ratio, "decay": cls.applies_decay}
        return tuple(name for name in FLAGS if not hidden.get(name))

    @classmethod
    @functools.cache
    def options(cls) -> dict[str, Option]:
        """Every option: the paper's own first, then flags and their settings, then those of the engine."""
        own = collect(cls)
        table = {name: own[name] for name in own if name not in ENGINE}
        for name in cls.flags():
            table[name] = switch(name)
            for member in FLAGS[name].values():
                table |= member.options
        return table | {name: own[name] for name in ENGINE}

    @classmethod
    @functools.cache
    def static_options(cls) -> frozenset[str]:
        return frozenset(cls.options()) - frozenset(DYNAMIC)

    @classmethod
    def resolve(cls, options: dict[str, Any]) -> dict[str, Any]:
        """`options` checked and completed with the defaults of the class."""
        table = cls.options()
        for key, value in options.items():
            if key not in table:
                raise cls.unknown_option(key, value)
        given = {key: table[key].check(cls.__name__, value) for key, value in options.items()}
        values = {key: option.default for key, option in table.items()} | given
        cls._refuse_useless(given, values)
        return values

    @classmethod
    def unknown_option(cls, key: str, value: Any) -> Exception:
        """The error for an option that this class does not have."""
        if key in FLAGS and key not in cls.flags():
            why = "it has no ratio" if key == "denominator" else "it applies weight decay inside its own rule"
            return ValueError(f"{cls.__name__}: `{key}={value}` cannot act on {cls.__name__}: {why}")
        return unknown(cls.__name__, key, cls.options())

    @classmethod
    def _refuse_useless(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        h = View(values)
        for name, reason in cls.refuses(h).items():
            if values[name] != cls.options()[name].default:
                raise ValueError(f"{cls.__name__}: `{name}={values[name]}` cannot act on {cls.__name__}: {reason}")
        for name in cls.flags():
            live = FLAGS[name].get(values[name])
            for member in FLAGS[name].values():
                for key in member.options if member is not live else ():
                    if key in given and (live is None or key not in live.options):
                        raise ValueError(
                            f"{cls.__name__}: `{key}` has no effect with `{name}={values[name]}`; set "
                            f"`{name}={member.value}` or drop `{key}`"
                        )

    # ---- construction --------------------------------------------------------------------------------------------
    _plan: plan.Plan | None = None
    _loss: Tensor | None = None
    _release: Release | None = None
    _used: tuple[Any, ...] | list[Any] = ()  # (step size, number of elements) of every tensor of the last step

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        given = options if lr is None else {"lr": lr, **options}
        values = self.resolve(given)
        inside = {name: torch.tensor(float(first), dtype=torch.float32) for name, first in self.shared.items()}
        super().__init__(params, {**values, "optimizer": type(self).__name__, "step": 0, **inside})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose options (checked like the constructor's) override the defaults of the optimizer."""
        if not isinstance(param_group, dict):
            raise TypeError(
                f"{type(self).__name__}: a parameter group must be a dict, got {type(param_group).__name__}"
            )
        if self._release is not None:
            raise ValueError(f"{type(self).__name__}: remove() the gradient release before adding parameters")
        internal = {"optimizer", "step", *self.shared}
        own = {k: v for k, v in param_group.items() if k not in (*TAGS, *internal)}
        changed = {k: self.defaults[k] for k, o in self.options().items() if self.defaults[k] != o.default}
        group = {**param_group, **self.resolve({**changed, **own})}
        if self.param_groups:  # a group that joins later has missed the steps so far
            first = self.param_groups[0]
            group |= {k: first[k] for k in ("step", *self.shared)}
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex() or not p.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"{type(self).__name__} needs real floating-point parameters, got {p.dtype}")
        self._plan = None

    # ---- the step ------------------------------------------------------------------------------------------------
    def report_loss(self, loss: Tensor | float) -> None:
        """Give the loss of the coming step to an optimizer whose step size depends on it.

        Called before `step()`; a second call before the step replaces the first. The mean over ranks is taken here,
        so all ranks must call it.

        Args:
            loss (`torch.Tensor` or `float`): the training loss as it was back-propagated, unscaled.
        """
        if not self.needs_loss:
            return
        if not isinstance(loss, Tensor):
            loss = torch.tensor(float(loss), dtype=torch.float32)  # whatever the default dtype is
        if loss.numel() != 1:
            raise ValueError(f"{type(self).__name__}: the loss must be a scalar, got shape {tuple(loss.shape)}")
        value = sharding.whole(loss.detach()).reshape(()).float()
        self._loss = sharding.mean_over_ranks(value.to(self._device()))

    def _device(self) -> torch.device:
        return next(p.device for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None, scaler: Any = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure (`Callable`, *optional*):
                Reevaluates the model and returns the loss, which also is the loss that [`report_loss`] would give.
            loss (`torch.Tensor` or `float`, *optional*): the same as a call of [`report_loss`] just before.
            scaler (`torch.amp.GradScaler`, *optional*):
                With it `closure` returns the unscaled loss and does not call `backward()`: this method scales, runs
                backward, unscales and steps (or skips). Call `scaler.update()` afterwards, as always.

        Returns:
            What `closure` returned, else None.

        Raises:
            `RuntimeError`: if the optimizer needs the loss and got none.
        """
        if scaler is not None:
            return self._scaled_step(closure, scaler)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            loss = result if loss is None else loss
        if loss is not None:
            self.report_loss(loss)
        self._step()
        return result

    def _scaled_step(self, closure: Callable[[], Any] | None, scaler: Any) -> Any:
        if closure is None:
            raise ValueError(f"{type(self).__name__}: `step(scaler=...)` needs a closure that returns the loss")
        with torch.enable_grad():
            loss = closure()
            scaler.scale(loss).backward()
        self.report_loss(loss)
        scaler.step(self)
        self._loss = None  # a skipped step leaves it behind
        return loss

    def _step(self) -> None:
        if self._release is not None:
            self._release.finish()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._loss = None
            return
        if not self.state and self._is_template_step():
            self._materialize()
            return
        self._materialize()
        scalars = self._begin()
        if self._plan is None or not self._plan.current(self):
            self._plan = plan.Plan(self, scalars)
        self._run(self._plan.calls, scalars)

    def _is_template_step(self) -> bool:
        """torch.distributed.checkpoint makes state by a step with every lr 0 and every gradient zero."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return not any(bool(sharding.whole(g.detach().abs().sum())) for g in grads)

    def _materialize(self) -> None:
        """State for every parameter that trains, with or without a gradient: all ranks must save the same keys."""
        for group in self.param_groups:
            for p in group["params"]:
                if (p.requires_grad or p.grad is not None) and p not in self.state:
                    self.state[p] = self._new_state(p, group)

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if group["precision"] != "nearest" and p.dtype != torch.bfloat16:
            self._warn_precision(p, group["precision"])
        reason = self.needs_whole(self._group_view(group))
        if reason and sharding.is_sharded(p):
            raise ValueError(f"{type(self).__name__}: {reason}")
        state: dict[str, Any] = {"step": 0}
        for name, slot in self.slots(p, self._group_view(group)).items():
            dtype = slot.dtype or precision.state_dtype(p, group["state_dtype"] if slot.narrow else "float32")
            state[name] = sharding.zeros(p, slot, dtype)
        return state

    def _warn_precision(self, p: Tensor, wanted: str) -> None:
        owner = type(self).__name__
        if p.dtype == torch.float16:
            raise ValueError(
                f"{owner}: `precision={wanted}` needs bfloat16 weights, got float16; use bfloat16 weights"
            )
        if all(q.dtype != torch.bfloat16 for q in self.parameters()) and not self.state:
            logger.warning("%s: `precision=%s` has no effect: no weight is bfloat16", owner, wanted)

    @classmethod
    def slots(cls, p: Tensor, h: Any) -> dict[str, Slot]:
        """Every buffer of a parameter: the rule's, the flags' and the residual of Kahan summation."""
        made = dict(cls.init(p, h))
        for flag in chosen(vars(h), cls.flags()):
            made |= flag.init(p, h)
        if cls._rounding(p, h) == "kahan":
            made[KAHAN] = sharding.like(p, dtype=torch.bfloat16)
        return made

    @staticmethod
    def _rounding(p: Tensor, h: Any) -> str:
        return h.precision if p.dtype == torch.bfloat16 else "nearest"

    def spec(self, group: dict[str, Any], p: Tensor, scalars: dict[str, Tensor]) -> Spec:
        """What is constant about the step of a parameter."""
        h = self._group_view(group)
        static = tuple((k, group[k]) for k in self.options() if k not in (*DYNAMIC, "backend", "seed"))
        names = tuple(n for n in self.slots(p, h) if n != KAHAN)
        narrow = tuple(n for n in names if self.state[p][n].dtype == torch.bfloat16)
        flags = chosen(group, self.flags())
        dynamic = (*DYNAMIC, *self._host_scalars(group, flags, 1), *scalars, *self.sums(h))
        return Spec(type(self), static, dynamic, flags, names, self._rounding(p, h), narrow)

    def _host_scalars(self, group: dict[str, Any], flags: tuple[Any, ...], t: int) -> dict[str, float]:
        h = self._group_view(group)
        found = dict(self.scalars(t, h))
        for flag in flags:
            found |= flag.scalars(t, h)
        return found

    def _group_view(self, group: dict[str, Any], **extra: Any) -> View:
        start = group.get("initial_lr", group["lr"])
        relative = float(group["lr"]) / float(start) if start else 1.0
        return View({k: v for k, v in group.items() if k != "params"} | {"schedule": relative} | extra)

    def _shared_view(self, group: dict[str, Any]) -> View:
        return View({name: group[name] for name in self.shared})

    def _begin(self) -> list[dict[str, Tensor]]:
        """Advance what belongs to the whole optimizer. Returns the 0-d tensors each group's tensors will see."""
        if self.needs_loss and self._loss is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the loss of this step and got none. Give it by "
                "`optimizer.step(loss=loss)` or `optimizer.report_loss(loss)` before `step()`; in a Trainer use "
                "`hf_optim.LossAwareTrainer` (or `class T(LossAwareMixin, YourTrainer)`); or start the unmodified "
                "script with `hf-optim run SCRIPT ...`"
            )
        device = self._device()
        made = []
        for group in self.param_groups:
            group["step"] += 1
            for name in self.shared:
                group[name] = group[name].to(device)
            s = self._shared_view(group)
            made.append(self.prepare(s, self._group_view(group, loss=self._loss)))
            group.update(vars(s))
        self._loss = None
        return made

    def _run(self, calls: list[plan.Call], scalars: list[dict[str, Tensor]]) -> None:
        values = [self._values(call, scalars) for call in calls]
        self._measure(calls, values)
        numel = sum(item.weight.numel() for call in calls for item in call.items)
        used: list[Any] = []
        for call, value in zip(calls, values):
            t = call.t + 1
            backend = call.group["backend"]
            if backend == "auto":
                backend = "fused" if numel >= execute.AUTO_NUMEL else "loop"
            sizes = execute.run(call, value, execute.salts(call, call.group["seed"], t), backend)
            used += [(size, item.p.numel()) for size, item in zip(sizes, call.items)]
            for item in call.items:
                item.state["step"] = t
        self._used = used

    def _values(self, call: plan.Call, scalars: list[dict[str, Tensor]]) -> dict[str, Any]:
        group = call.group
        fixed: dict[str, Any] = {name: float(group[name]) for name in DYNAMIC}
        return fixed | self._host_scalars(group, call.spec.flags, call.t + 1) | scalars[call.position]

    def _measure(self, calls: list[plan.Call], values: list[dict[str, Any]]) -> None:
        """Whole-model sums: one pass over the tensors that add to them, one reduction per device mesh."""
        names = [self.sums(self._group_view(call.group)) for call in calls]
        totals: dict[str, dict[Any, Any]] = {}
        for call, value, wanted in zip(calls, values, names):
            for item in call.items if wanted else ():
                whole_bufs = {name: item.state[name] for name in call.spec.buffers}
                assert item.p.grad is not None
                h = call.spec.hyper(value)
                part = measure_tensor(call.spec, item.p.detach(), item.p.grad.detach(), whole_bufs, h)
                for name, x in part.items():  # results with equal placements add up before they are reduced
                    place = tuple(getattr(x, key, None) for key in ("device_mesh", "placements", "device"))
                    sums = totals.setdefault(name, {})
                    sums[place] = sums[place] + x if place in sums else x
        full = {name: sum(sharding.whole(x) for x in sums.values()) for name, sums in totals.items()}
        for value, wanted in zip(values, names):
            value |= {name: full[name] for name in wanted}

    def effective_lr(self) -> float | None:
        """The step size of the last step, averaged over all weights it moved; None before the first step.

        This is the number that multiplied the direction: what the loss, a relative schedule or the parameter scale
        made of `lr`. Reading it waits for the device.
        """
        if not self._used:
            return None
        total = sum(n for _, n in self._used)
        return (
            sum(float(sharding.whole(size) if isinstance(size, Tensor) else size) * n for size, n in self._used)
            / total
        )

    # ---- gradient release ------------------------------------------------------------------------------------------
    def release_gradients(self) -> Release:
        """Step each parameter inside backward, as soon as its gradient is complete, and free the gradient.

        Call `report_loss` (where needed) before `backward()`, and `step()` after every `backward()` as usual.

        Returns:
            A handle whose `remove()` goes back to ordinary steps.

        Raises:
            `ValueError`: if an option needs all gradients at once, or several ranks average plain gradients later.
        """
        if self._release is not None:
            raise ValueError(f"{type(self).__name__}: gradients are released already")
        self._release = Release(self)
        return self._release

    # ---- checkpoints -----------------------------------------------------------------------------------------------
    @staticmethod
    def convert_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the checkpoint of another implementation of the same rule; here nothing is known."""
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, every state tensor in the dtype it was saved in.

        Raises:
            `ValueError`: if it is another optimizer's, or a shape differs; nothing has been changed then.
        """
        checkpoint.load(self, state_dict, super().load_state_dict)
        self._plan = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it: a group key that only resumed runs would save
        self._plan = None
        for group in self.param_groups:  # an older checkpoint may lack an option
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def parameters(self) -> Iterator[Tensor]:
        """All parameters, group by group."""
        for group in self.param_groups:
            yield from group["params"]
