# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The papers' algorithms in float64 and in their own notation, written without the engine.

`tests/oracles/NAME.py` describes the optimizer NAME of the registry by

    class Oracle:                                     # one tensor
        decays = False                                # True: `direction` applies the weight decay itself
        def __init__(self, shape, **options)          # the options of the class, with the same names and defaults
        def direction(self, x, g, step)               # u, or (u, alpha):  x <- x - alpha weight_decay x - alpha u
        @staticmethod
        def together(oracles, gs)                     # optional: all tensors at once, before any `direction`
        def second_moment(self)                       # where `decay=stable` acts: v_hat, or what has the same mean,
        def gain(self)                                # or what a constant gradient ends up multiplied by

    CASES = [{"option": value, ...}, ...]             # each option at a value that matters, with what it needs to act
    BASE = {"option": value, ...}                     # optional: for every run, so that the rule shows in a few steps
    APPROXIMATE = [{"option": value, ...}, ...]       # optional: cases that round on purpose
    NEEDS = {"flag": {"option": value, ...}, ...}     # optional: what a flag needs to act; None where nothing helps
    TRANSPOSE = {"option": value, ...}                # optional: what makes f(g^T) = f(g)^T; None where nothing does

`step` has `lr`, `schedule` (lr / initial lr), `weight_decay` (0 where the decay is part of the gradient) and `loss`.
The flags, with their own CASES, are in flags.py; the oracle of a preset of flags is that of its base:
`from .adamw import CASES, Oracle`.
"""

import importlib
from types import SimpleNamespace

from . import flags


def load(name):
    """The oracle module of an optimizer."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AssertionError(
            f"tests/oracles/{name}.py is missing: transcribe the paper's algorithm in float64"
        ) from None


class Model:
    """An optimizer of several tensors: the oracle of each, with the flags around it at their stages."""

    def __init__(self, name, shapes, **options):
        rule = load(name).Oracle
        self.flags, own = flags.split(options)
        self.oracles = [rule(shape, **own) for shape in shapes]
        self.bounds = [flags.CPR(self.flags) for _ in shapes]
        self.slow, self.t = None, 0

    def step(self, xs, gs, lr, weight_decay=0.0, loss=None, schedule=1.0):
        """The weights after one step; all tensors are float64."""
        self.t += 1
        on, new = self.flags, list(xs)
        self.slow = self.slow or list(xs)
        live = [i for i, x in enumerate(xs) if x.numel()]
        oracles = [self.oracles[i] for i in live]
        gs = {i: flags.gradient(gs[i], xs[i], on, weight_decay) for i in live}
        own = 0.0 if on.decay == "coupled" else weight_decay
        step = SimpleNamespace(lr=lr, schedule=schedule, weight_decay=own, loss=loss)
        if hasattr(self.oracles[0], "together"):
            self.oracles[0].together(oracles, list(gs.values()))
        outs = {i: self.oracles[i].direction(xs[i], gs[i], step) for i in live}
        gain = flags.stable_gain(oracles, [xs[i] for i in live]) if on.decay == "stable" and live else None
        for i in live:
            u, alpha = outs[i] if isinstance(outs[i], tuple) else (outs[i], lr)
            q = flags.update(u, gs[i], on)
            if not getattr(self.oracles[i], "decays", False):
                q = q + flags.decay(xs[i], u, alpha, weight_decay, on, gain)
            if on.trust_ratio and on.trust_on == "update":
                q = flags.trust(q, xs[i], on)
            new[i] = self.around(i, xs[i] - alpha * q, xs[i])
        return new

    def around(self, i, new, old):
        """What happens to the weights after the step."""
        on = self.flags
        if on.decay == "cpr" and new.dim() > 1:
            new = self.bounds[i](new, old)
        if on.lookahead and self.t % on.lookahead_k == 0:
            new = self.slow[i] = self.slow[i] + on.lookahead_alpha * (new - self.slow[i])
        return new
