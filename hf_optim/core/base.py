# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The public base class. A paper says its options, `init`, `scalars` and `update`; the rest is here and beside it."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import checkpoint, execute, plan, precision, sharding
from .flags import FLAGS, Flag, chosen, switch, techniques
from .options import Option, collect, hp, unknown
from .pipeline import KAHAN, Spec, View
from .release import Release, refuse_gradients
from .sharding import Slot


logger = logging.getLogger(__name__)

DYNAMIC = ("lr", "weight_decay")  # change from step to step without recompiling
ENGINE = ("backend", "precision", "state_dtype", "seed", "gradient_release")
TAGS = ("params", "param_names", "initial_lr", "name")  # group keys of torch, its schedulers and Lightning


@dataclass(frozen=True)
class Place:
    """Where a parameter sits in a model: what rules and flags that tell kinds of weights apart may look at."""

    module: torch.nn.Module
    name: str  # of the parameter, with the path of its module
    p: Tensor
    is_output: bool  # a weight of the output layer (of a tied embedding too)
    is_target: bool | None = None  # matched by `optim_target_modules`; None where that is not given


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
        "auto", "eager loop, or compiled by Inductor; auto compiles large models", choices=("auto", "loop", "fused")
    )
    precision: str = hp(
        "nearest", "how bf16 weights are rounded after a step", choices=("nearest", "stochastic", "kahan")
    )
    state_dtype: str = hp(
        "float32",
        "storage of parameter-sized state, rounded stochastically; int8 is for averages: second moments are bf16 then",
        choices=("float32", "bfloat16", "int8"),
    )
    seed: int = hp(0, "seed of stochastic rounding", ge=0)
    gradient_release: bool = hp(False, "step each parameter inside backward, and free its gradient at once")

    # ---- what one paper's file says ------------------------------------------------------------------------------
    elementwise: ClassVar[bool] = False  # no reductions: tensors may be seen flat and shard by shard
    needs_matrix: ClassVar[bool] = False  # the shape of the weight matters: meaningless on flat shards
    needs_loss: ClassVar[bool] = False  # prepare() reads h.loss
    uses_ratio: ClassVar[bool] = False  # update() ends in h.ratio(num, den), so `denominator` applies
    returns_lr: ClassVar[bool] = False  # update() returns (direction, step size)
    applies_decay: ClassVar[bool] = False  # update() applies h.weight_decay itself, so `decay` does not apply
    uses_targets: ClassVar[bool] = False  # options_for() looks at `optim_target_modules`
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
    def averages(h: Any) -> dict[str, tuple[float, float]]:
        """`{"m": (decay, share)}` where `m <- decay m + share g` is all that `update` makes of g. Such a buffer can
        take the gradients of micro-batches one by one: none has to be kept until the step."""
        return {}

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
    def options_for(at: Place, h: Any) -> dict[str, Any]:
        """Options that a parameter gets from its place in the model; [`param_groups`] makes groups of them."""
        return {}

    @staticmethod
    def hint(groups: list[dict[str, Any]]) -> str | None:
        """What to warn about once, before the first step."""
        return None

    @staticmethod
    def second_moment(s: Any, h: Any) -> Tensor | None:
        """The corrected average of g^2 that `update` left in the state (any tensor of the same mean will do)."""
        return None

    @staticmethod
    def gain(h: Any) -> float | None:
        """What a constant gradient is multiplied by in the long run, for rules without a second moment."""
        return None

    # ---- options -------------------------------------------------------------------------------------------------
    @classmethod
    @functools.cache
    def flags(cls) -> tuple[str, ...]:
        """Names of the flags that can act on this optimizer, in stage order."""
        return tuple(name for name in FLAGS if techniques(name, cls))

    @classmethod
    @functools.cache
    def options(cls) -> dict[str, Option]:
        """Every option: the paper's own first, then flags and their settings, then those of the engine."""
        own = collect(cls)
        table = {name: own[name] for name in own if name not in ENGINE}
        for name in cls.flags():
            members = techniques(name, cls)
            table[name] = switch(name, members)
            for member in members.values():
                table |= member.options
        return table | {name: own[name] for name in ENGINE}

    @classmethod
    @functools.cache
    def own_options(cls) -> tuple[str, ...]:
        """The paper's own options: neither a flag's nor the engine's, nor what changes from step to step."""
        return tuple(name for name in collect(cls) if name not in (*DYNAMIC, *ENGINE))

    @classmethod
    def completed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options`, unchecked, on top of the defaults of the class."""
        return {key: option.default for key, option in cls.options().items()} | dict(options)

    @classmethod
    def asks_for_place(cls, values: dict[str, Any]) -> bool:
        """Whether these options depend on where in the model a parameter is."""
        flags = chosen(cls.completed(values), cls.flags())
        return cls.options_for is not Optimizer.options_for or any(
            flag.options_for is not Flag.options_for for flag in flags
        )

    @classmethod
    @functools.cache
    def static_options(cls) -> frozenset[str]:
        return frozenset(cls.options()) - frozenset(DYNAMIC)

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` as plain values, each of them known, of its type and in its range."""
        table = cls.options()
        for key, value in options.items():
            if key not in table or cls.excluded(key, value):
                raise cls.unknown_option(key, value)
        return {key: table[key].check(cls.__name__, value) for key, value in options.items()}

    @classmethod
    def resolve(cls, options: dict[str, Any], inherited: dict[str, Any] | None = None) -> dict[str, Any]:
        """`options` checked and completed with what a group inherits and the defaults of the class."""
        given = cls.checked(options)
        values = cls.completed({**(inherited or {}), **given})
        cls._refuse_useless(given, values)
        return values

    @classmethod
    def unknown_option(cls, key: str, value: Any) -> Exception:
        """The error for an option that this class does not have."""
        why = cls.excluded(key, value)
        if why:
            return ValueError(f"{cls.__name__}: `{key}={value}` cannot act on {cls.__name__}: {why}")
        return unknown(cls.__name__, key, cls.options())

    @classmethod
    def excluded(cls, key: str, value: Any) -> str:
        """Why this setting of a flag cannot act on this class; empty if it can."""
        members = FLAGS.get(key, {})
        named = [m for v, m in members.items() if isinstance(value, (str, bool)) and v == value]
        hits = named or ([] if key in cls.flags() else list(members.values()))
        return hits[0].excludes(cls) if hits else ""

    @classmethod
    def _refuse_useless(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        owner, flags, setters = cls.__name__, chosen(values, cls.flags()), dict[str, str]()
        for flag in flags:
            other = setters.setdefault(flag.sets, flag.flag) if flag.sets else flag.flag
            if other != flag.flag:
                raise ValueError(f"{owner}: `{flag.flag}` cannot act with `{other}`: each sets {flag.sets}")
        sources: tuple[Any, ...] = (cls, *flags)
        for name, reason in [pair for source in sources for pair in source.refuses(View(values)).items()]:
            if name in values and values[name] != cls.options()[name].default:
                raise ValueError(f"{owner}: `{name}={values[name]}` cannot act on {owner}: {reason}")
        for key in given:
            host = cls.idle_host(key, values)
            if host is not None:
                raise ValueError(
                    f"{owner}: `{key}` has no effect with `{host.flag}={values[host.flag]}`; set "
                    f"`{host.flag}={host.value}` or drop `{key}`"
                )

    @classmethod
    def idle_host(cls, key: str, values: dict[str, Any]) -> type[Flag] | None:
        """The technique that `key` is a setting of, if `values` does not switch it on."""
        hosts = [f for name in cls.flags() for f in FLAGS[name].values() if key in f.options]
        live = chosen(values, cls.flags())
        return None if not hosts or any(host in live for host in hosts) else hosts[0]

    @classmethod
    def with_preset(cls, preset: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` on top of a preset, without those of its settings that belong to what `options` replaces."""
        values = cls.completed({**preset, **options})
        kept = {key: value for key, value in preset.items() if cls.idle_host(key, values) is None}
        return {**kept, **options}

    # ---- construction --------------------------------------------------------------------------------------------
    _plan: plan.Plan | None = None
    _loss: Tensor | None = None
    keeps_loss: bool = False  # until the next report: DeepSpeed makes one step of each group
    _release: Release | None = None
    _since: Mapping[int, Any] = {}  # position of a group -> its options and the step that they came with
    _used: list[execute.Used] | tuple[()] = ()  # of the last step

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        values = self.resolve(options if lr is None else {"lr": lr, **options})
        inside = {  # whatever the defaults of torch are
            name: torch.tensor(float(first), dtype=torch.float32, device="cpu") for name, first in self.shared.items()
        }
        super().__init__(params, {**values, "optimizer": type(self).__name__, "step": 0, **inside})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose options (checked like the constructor's) override the defaults of the optimizer."""
        if not isinstance(param_group, dict):
            raise TypeError(f"{type(self).__name__}: param_group must be a dict, not {type(param_group).__name__}")
        if self._release is not None:
            raise ValueError(f"{type(self).__name__}: remove() the gradient release before adding parameters")
        internal = {"optimizer", "step", *self.shared}
        own = {k: v for k, v in param_group.items() if k not in (*TAGS, *internal)}
        changed = {k: self.defaults[k] for k, o in self.options().items() if self.defaults[k] != o.default}
        group = {**param_group, **self.resolve(own, changed)}
        if self.param_groups:  # a group that joins later has missed the steps so far
            first = self.param_groups[0]
            group |= {k: first[k] for k in ("step", *self.shared)}
            if group["gradient_release"] != first["gradient_release"]:
                raise ValueError(
                    f"{type(self).__name__}: `gradient_release` must be the same in all groups, got "
                    f"{first['gradient_release']} and {group['gradient_release']}"
                )
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex() or not p.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"{type(self).__name__} needs real floating-point parameters, got {p.dtype}")
        self._plan = None

    # ---- the step ------------------------------------------------------------------------------------------------
    @torch.compiler.disable  # within a compiled training step it would keep nothing; the step has code of its own
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
            loss = torch.tensor(float(loss), dtype=torch.float32, device="cpu")  # whatever the defaults are
        if loss.numel() != 1:
            raise ValueError(f"{type(self).__name__}: the loss must be a scalar, got shape {tuple(loss.shape)}")
        value = sharding.whole(loss.detach()).reshape(()).float()
        self._loss = sharding.mean_over_ranks(value.to(self._device()))

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.compiler.disable
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
        if self._release is not None or self.param_groups[0]["gradient_release"]:
            raise ValueError(
                f"{type(self).__name__}: a gradient scaler looks at all gradients before a step, when released ones "
                "are gone; compute in bf16 without a scaler, or drop gradient release"
            )
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
        if all(p.grad is None for p in self.parameters()):
            self._loss = None
            return
        if not self.state and self._is_template_step():
            self._materialize()
            return
        refuse_gradients(self)
        if self._plan is None or not self._plan.current(self):
            self._plan = None
            self._materialize()
        scalars = self._begin()
        if self._plan is None:
            self._plan = plan.Plan(self, scalars)
        self._run(self._plan.calls, scalars, self._plan.numel)

    def _is_template_step(self) -> bool:
        """torch.distributed.checkpoint makes state by a step with every lr 0 and every gradient zero."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        return not any(sharding.whole(p.grad.detach().abs().sum()) for p in self.parameters() if p.grad is not None)

    def _warn_idle(self) -> None:
        """Before the first step, when all groups are known: settings that can do nothing."""
        texts = {self.hint(self.param_groups)}
        for flag in {flag for group in self.param_groups for flag in chosen(group, self.flags())}:
            if flag.multiplies and not any(group[flag.multiplies] for group in self.param_groups):
                texts.add(f"`{flag.flag}={flag.value}` has no effect while `{flag.multiplies}` is 0: set it")
        for text in sorted(filter(None, texts)):
            logger.warning("%s: %s", type(self).__name__, text)

    def _materialize(self) -> None:
        """State for every parameter that trains, with or without a gradient: all ranks must save the same keys."""
        if not self.state:
            self._warn_idle()
        for p, position in self.placed():
            if (p.requires_grad or p.grad is not None) and not self.state.get(p):
                self.state[p] = self._new_state(p, self.param_groups[position])

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if group["precision"] != "nearest" and p.dtype != torch.bfloat16:
            self._warn_precision(p, group["precision"])
        reason = self.needs_whole(self._group_view(group))
        if reason and sharding.is_sharded(p):
            raise ValueError(f"{type(self).__name__}: {reason}")
        state: dict[str, Any] = {"step": 0}
        for name, slot in self.slots(p, self._group_view(group)).items():
            state[name] = sharding.zeros(p, slot, precision.slot_dtype(p, slot, group["state_dtype"]))
        return state

    def _warn_precision(self, p: Tensor, wanted: str) -> None:
        owner = type(self).__name__
        if p.dtype == torch.float16:
            raise ValueError(f"{owner}: `precision={wanted}` needs bfloat16 weights, got float16")
        if all(q.dtype != torch.bfloat16 for q in self.parameters()) and not self.state:
            logger.warning("%s: `precision=%s` has no effect: no weight is bfloat16", owner, wanted)

    @classmethod
    def slots(cls, p: Tensor, h: Any) -> dict[str, Slot]:
        """Every buffer of a parameter: the rule's, the flags', scales of codes, the residual of Kahan summation."""
        made = cls._seen(p, h)
        coded = [name for name, slot in made.items() if precision.is_coded(p, slot, h.state_dtype)]
        made |= {precision.scale_of(name): sharding.per_block(p, precision.BLOCK) for name in coded}
        if cls._rounding(p, h) == "kahan":
            made[KAHAN] = sharding.like(p, dtype=torch.bfloat16)
        return made

    @classmethod
    def _seen(cls, p: Tensor, h: Any) -> dict[str, Slot]:
        """The buffers that the rule and the flags see."""
        made = dict(cls.init(p, h))
        for flag in chosen(vars(h), cls.flags()):
            made |= flag.init(p, h)
        return made

    @staticmethod
    def _rounding(p: Tensor, h: Any) -> str:
        return h.precision if p.dtype == torch.bfloat16 else "nearest"

    def spec(self, group: dict[str, Any], p: Tensor, scalars: dict[str, Tensor]) -> Spec:
        """What is constant about the step of a parameter."""
        h = self._group_view(group)
        flags = chosen(group, self.flags())
        known = (*self.own_options(), *self.flags(), *(name for flag in flags for name in flag.options))
        static = tuple((name, group[name]) for name in known)
        made, state, rounding = self._seen(p, h), self.state[p], self._rounding(p, h)
        needed = made | ({KAHAN: sharding.like(p)} if rounding == "kahan" else {})
        if any(name not in state or state[name].shape != slot.shape for name, slot in needed.items()):
            raise ValueError(f"{type(self).__name__}: no state fits: an option, shape or dtype changed; make it anew")
        narrow = tuple(n for n in made if state[n].dtype == torch.bfloat16)
        coded = tuple(n for n in made if precision.scale_of(n) in state.keys() - made.keys())
        sums, stages = self.all_sums(group), tuple((flag, flag.acts_at(h)) for flag in flags)
        dynamic = (*DYNAMIC, *self._host_scalars(group, flags, 1), *scalars, *sums)
        return Spec(type(self), static, dynamic, stages, tuple(made), rounding, narrow, sums, coded)

    def all_sums(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the whole-model sums that the rule and the flags of a group ask for."""
        h = self._group_view(group)
        of_flags = (name for flag in chosen(group, self.flags()) for name in flag.sums(type(self), h))
        return (*self.sums(h), *of_flags)

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

    def _begin(self) -> list[dict[str, Tensor]]:
        """Advance what belongs to the whole optimizer. Returns the 0-d tensors each group's tensors will see."""
        if self.needs_loss and self._loss is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the loss of this step and got none. Give it by `optimizer.step(loss="
                "loss)` or (with gradient release, before `backward()`) `.report_loss(loss)`; in a Trainer use "
                "`hf_optim.LossAwareTrainer` (or `class T(LossAwareMixin, YourTrainer)`); or start the unmodified "
                "script with `hf-optim run SCRIPT ...`"
            )
        for group in self.param_groups:  # a schedule or the user wrote to it: refuse before anything changes
            for name in DYNAMIC:  # not its range: a schedule may end at -1e-20
                if not math.isfinite(group[name]):
                    raise ValueError(f"{type(self).__name__}: `{name}` must be finite, got {group[name]!r}")
            if self._plan is None:
                self.checked({name: group[name] for name in self.static_options()})
        device = self._device()
        made = []
        for group in self.param_groups:
            group["step"] += 1
            for name in self.shared:
                group[name] = group[name].to(device)
            s = View({name: group[name] for name in self.shared})
            made.append(self.prepare(s, self._group_view(group, loss=self._loss)))
            group.update(vars(s))
        self._loss = self._loss if self.keeps_loss else None
        return made

    def _plainly(self) -> Any:
        """A step inside an autocast block is the step outside."""
        kind = self._device().type
        return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()

    def _run(self, calls: list[plan.Call], scalars: list[dict[str, Tensor]], numel: int) -> None:
        with self._plainly():
            values = [self._values(call, scalars) for call in calls]
            self._measure(calls, values, numel)
            self._used = [used for call, value in zip(calls, values) for used in self._run_call(call, value, numel)]

    def _run_call(self, call: plan.Call, values: dict[str, Any], numel: int) -> list[execute.Used]:
        """One call of a step of `numel` elements in all."""
        t = call.t + 1
        way = execute.fused if execute.ready(call, self._backend(call, numel)) else execute.loop
        used = way(call, values, execute.salts(call, call.group["seed"], t))
        for item in call.items:
            item.state["step"] = t
        return used

    def _backend(self, call: plan.Call, numel: int) -> str:
        """The loop until options that code is compiled for stay for a step: they may be on a schedule."""
        backend, static, now = execute.resolve(call.group["backend"], numel), call.spec.static, call.group["step"]
        if call.chunks or not execute.fusable(call.spec, call.items[0].weight, backend):
            return backend
        last, since = self._since.get(call.position, (static, now - 1))
        since = since if last == static else now
        self._since = {**self._since, call.position: (static, since)}
        if since < now:
            return backend
        execute.tell_once(
            "%s: an option changed that is compiled into steps: the loop steps until it stays", type(self).__name__
        )
        return "loop"

    def _values(self, call: plan.Call, scalars: list[dict[str, Tensor]]) -> dict[str, Any]:
        group, device = call.group, call.items[0].weight.device
        fixed: dict[str, Any] = {name: float(group[name]) for name in DYNAMIC}
        shared = {name: x.to(device, non_blocking=True) for name, x in scalars[call.position].items()}
        return fixed | self._host_scalars(group, tuple(flag for flag, _ in call.spec.flags), call.t + 1) | shared

    def _measure(self, calls: list[plan.Call], values: list[dict[str, Any]], numel: int) -> None:
        """Whole-model sums: one pass over the tensors that add to them, one reduction per device mesh."""
        totals: dict[str, dict[Any, Any]] = {}
        asked = [(call, value) for call, value in zip(calls, values) if call.spec.sums]
        parts = [x for call, value in asked for x in execute.summands(call, value, self._backend(call, numel))]
        for _, measure in sorted(parts, key=lambda part: part[0]):
            for name, x in measure().items():  # results with equal placements add up before they are reduced
                place = tuple(getattr(x, key, None) for key in ("device_mesh", "placements", "device"))
                sums = totals.setdefault(name, {})
                sums[place] = sums[place] + x if place in sums else x
        device = self._device()
        full = {name: sum(sharding.whole(x, device) for x in sums.values()) for name, sums in totals.items()}
        for call, value in asked:
            value |= {name: sharding.whole(full[name], call.items[0].weight.device) for name in call.spec.sums}

    def effective_lr(self) -> float | None:
        """The step size of the last step, averaged over all weights it moved; None before the first step.

        This is the number that multiplied the direction: what the loss, a relative schedule or the parameter scale
        made of `lr`. Reading it waits for the device.
        """
        if not self._used:
            return None
        each = [(size, item.p.numel()) for sizes, items in self._used for size, item in zip(sizes, items)]
        total = sum(float(sharding.whole(size) if isinstance(size, Tensor) else size) * n for size, n in each)
        return total / sum(n for _, n in each)

    # ---- gradient release ------------------------------------------------------------------------------------------
    def release_gradients(self) -> Release:
        """Step each parameter inside backward, as soon as its gradient is complete, and free the gradient.

        Call `report_loss` (where needed) before `backward()`, and `step()` after it as usual. In a Trainer the option
        `gradient_release=true` does all this.

        Returns:
            [`Release`]: a handle. `with handle.accumulate():` goes around the backward of every micro-batch of a step
            but the last; `remove()` goes back to ordinary steps.

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
        here = self.param_groups[0]["gradient_release"]
        checkpoint.load(self, state_dict, super().load_state_dict)
        self._plan, self._used = None, ()
        for group in self.param_groups:
            group["gradient_release"] = here  # an affair of the run, whose hooks and clipping are what they are
        if self._release is not None:
            self._release.forget()
            self._release.options = []  # what it keeps from step to step holds the old state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it: a group key that only resumed runs would save
        self._plan = None
        for group in self.param_groups:  # an older checkpoint may lack an option
            group |= self.defaults | group

    def parameters(self) -> Iterator[Tensor]:
        """All parameters, group by group."""
        return (p for group in self.param_groups for p in group["params"])

    def placed(self) -> list[tuple[Tensor, int]]:
        """All parameters, each with the position of its group."""
        return [(p, position) for position, group in enumerate(self.param_groups) for p in group["params"]]
