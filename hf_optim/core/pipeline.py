# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The one step: read, gradient stage, update, update stage, decay stage, step stage, parameter stage, write.

`step_tensor` is what the loop calls, what Inductor compiles and what runs inside backward under gradient release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import precision, sharding
from .flags import Flag


if TYPE_CHECKING:
    from .base import Optimizer

KAHAN = "residual"  # state of `precision="kahan"`


class View:
    """Names for values: `h` (options and scalars), `s` (state) and `c` (context)."""

    def __init__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:  # reached only for a name that is not there
        raise AttributeError(f"{name!r} is not among {', '.join(vars(self))}")


@dataclass(frozen=True)
class Spec:
    """Everything about a step that does not change from step to step: the key of the compiled code."""

    rule: type[Optimizer]
    static: tuple[tuple[str, Any], ...]  # options that are constants of the compiled code
    dynamic: tuple[str, ...]  # scalars that change: lr, weight_decay and what scalars() and prepare() return
    flags: tuple[tuple[type[Flag], str], ...]  # each with its stage
    buffers: tuple[str, ...]
    rounding: str  # nearest | stochastic | kahan, for this tensor's dtype
    narrow: tuple[str, ...]  # bf16 state, always rounded stochastically (nearest would stall an average)
    sums: tuple[str, ...] = ()  # of the whole model, which `dynamic` has, too
    coded: tuple[str, ...] = ()  # int8 state, rounded in the same way; its scales are buffers that no rule sees

    @property
    def stored(self) -> tuple[str, ...]:
        """Every buffer of a parameter: those of rule and flags, scales, and Kahan's residual."""
        scales = (precision.scale_of(name) for name in self.coded)
        return (*self.buffers, *scales, *([KAHAN] if self.rounding == "kahan" else []))

    @property
    def noisy(self) -> bool:
        return self.rounding == "stochastic" or bool(self.narrow or self.coded)

    @property
    def elementwise(self) -> bool:
        return self.rule.elementwise and all(flag.elementwise for flag, _ in self.flags)

    def stage(self, name: str) -> list[type[Flag]]:
        return [flag for flag, stage in self.flags if stage == name]

    def hyper(self, values: dict[str, Any]) -> View:
        """`h`: the options as Python constants, the changing scalars as floats or 0-d tensors, and `ratio`."""
        h: Any = View(dict(self.static) | values)
        for flag in self.stage("ratio"):
            h.ratio = _bind(flag, h)
        return h


def _bind(flag: type[Flag], h: View) -> Callable[[Tensor, Tensor], Tensor]:
    def ratio(num: Tensor, den: Tensor) -> Any:
        u = flag.apply(num, den, h)  # type: ignore[attr-defined]
        u.signs = num  # denominators are positive
        return u

    return ratio


def read(spec: Spec, p: Tensor, g: Tensor, bufs: dict[str, Tensor], h: View) -> Any:
    """Parameter, gradient (after the gradient stage) and state in compute precision."""
    s = View({name: _load(spec, name, bufs) for name in spec.buffers})
    weight, gradient = precision.read_weight(p, bufs.get(KAHAN)), precision.read_gradient(g)
    c: Any = View({"p": weight, "g": gradient, "s": s, "h": h, "rule": spec.rule})
    for flag in spec.stage("gradient"):
        c.g = flag.apply(c.g, c)  # type: ignore[attr-defined]
    return c


def _load(spec: Spec, name: str, bufs: dict[str, Tensor]) -> Tensor:
    """A state buffer in compute precision."""
    codes = bufs[name]
    if name not in spec.coded:
        return precision.widen(codes)
    value = precision.read_codes(sharding.local(codes), sharding.local(bufs[precision.scale_of(name)]))
    return sharding.placed(value, sharding.layout(codes))


def step_tensor(
    spec: Spec, p: Tensor, g: Tensor, bufs: dict[str, Tensor], h: View, salt: Any = 0, offset: Any = 0
) -> Any:
    """One step of one tensor, in place on `p` and `bufs`; `g` is only read.

    Returns:
        The step size that was used: `h.lr`, or what the rule returned beside its direction.
    """
    c = read(spec, p, g, bufs, h)
    out = spec.rule.update(c.g, c.p, c.s, h)
    c.u, c.lr = out if isinstance(out, tuple) else (out, h.lr)
    u, c.signs = c.u, vars(c.u).pop("signs", c.u)
    for flag in spec.stage("update"):
        u = flag.apply(u, c)  # type: ignore[attr-defined]
    del c.signs  # in the loop, a temporary as large as the weight
    for flag in spec.stage("decay"):  # joins the direction: p (1 - lr wd) would round to p for lr wd < 2^-25
        u = u + flag.apply(c.p, c)  # type: ignore[attr-defined]
    for flag in spec.stage("step"):
        u = flag.apply(u, c)  # type: ignore[attr-defined]
    new = c.p - c.lr * u
    for flag in spec.stage("parameter"):
        new = flag.apply(new, c)  # type: ignore[attr-defined]
    _write(spec, p, new, bufs, c.s, salt, offset)
    return c.lr


def _write(spec: Spec, p: Tensor, new: Tensor, bufs: dict[str, Tensor], s: View, salt: Any, offset: Any) -> None:
    channels = {name: channel for channel, name in enumerate(spec.buffers, 1)}
    for name in _in_order({name: getattr(s, name) for name in channels}, bufs):
        _keep(spec, name, bufs, getattr(s, name), salt, offset, channels[name])
    if spec.rounding == "kahan":
        value = sharding.local(sharding.match(new, p))
        precision.write_kahan(sharding.local(p), sharding.local(bufs[KAHAN]), value)
    else:
        _store(p, new, spec.rounding == "stochastic", salt, offset, 0)


def _in_order(values: dict[str, Tensor], bufs: dict[str, Tensor]) -> Iterator[str]:
    """The buffers to write, each after those that get what it holds now: no copies, which Inductor would leave out."""
    while values:
        free = [n for n in values if not any(values[other] is bufs[n] for other in values if other != n)]
        if not free:
            raise RuntimeError(f"a rule may not swap the buffers {', '.join(values)}: compute one of them anew")
        del values[free[0]]
        yield free[0]


def _keep(spec: Spec, name: str, bufs: dict[str, Tensor], value: Tensor, salt: Any, offset: Any, channel: int) -> None:
    """Write a state buffer: the counterpart of `_load`."""
    if name not in spec.coded:
        _store(bufs[name], value, name in spec.narrow, salt, offset, channel)
        return
    codes, scale = bufs[name], sharding.local(bufs[precision.scale_of(name)])
    value = sharding.local(sharding.match(value, codes))
    precision.write_codes(sharding.local(codes), scale, value, precision.noise_bits(value, salt, offset, channel))


def _store(buffer: Tensor, value: Tensor, stochastic: bool, salt: Any, offset: Any, channel: int) -> None:
    value, buffer = sharding.local(sharding.match(value, buffer)), sharding.local(buffer)
    precision.write(buffer, value, precision.noise_bits(value, salt, offset, channel) if stochastic else None)


def absorb_tensor(spec: Spec, g: Tensor, bufs: dict[str, Tensor], h: View, salt: Any, offset: Any, count: int) -> None:
    """Add the gradient of a micro-batch, the `count`-th of its step, to the averages: a step with the last gradient
    then is one with the sum, decay (m + share/decay g1) + share g2 = decay m + share (g1 + g2)."""
    g = precision.read_gradient(g)
    averages = spec.rule.averages(h)
    for channel, name in enumerate(spec.buffers, 1):
        if name in averages:
            decay, share = averages[name]
            value = _load(spec, name, bufs) + share / decay * g
            channel += count * (1 + len(spec.buffers))  # other noise than that of the step and of other micro-batches
            _keep(spec, name, bufs, value, salt, offset, channel)


def measure_tensor(spec: Spec, p: Tensor, g: Tensor, bufs: dict[str, Tensor], h: View) -> dict[str, Tensor]:
    """This tensor's part of the whole-model sums of rule and flags; nothing is written."""
    c = read(spec, p, g, bufs, h)
    own = spec.rule.measure(c.g, c.p, c.s, h) if spec.rule.sums(h) else {}
    for flag, _ in spec.flags:
        own |= flag.measure(c) if flag.sums(spec.rule, h) else {}
    return own
