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

    CASES = [{"option": value, ...}, ...]             # each option at a value that matters, with what it needs to act
    NEEDS = {"flag": {"option": value, ...}, ...}     # optional: what a flag needs to act
    TRANSPOSE = {"option": value, ...}                # optional: what makes f(g^T) = f(g)^T; None where nothing does

`step` has `lr`, `schedule` (lr / initial lr), `weight_decay` and `loss`. The flags, with their own CASES, are in
flags.py; the oracle of a preset of flags is that of its base: `from .adamw import CASES, Oracle`.
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
        self.slow, self.t = None, 0

    def step(self, xs, gs, lr, weight_decay=0.0, loss=None, schedule=1.0):
        """The weights after one step; all tensors are float64."""
        self.t += 1
        on = self.flags
        step = SimpleNamespace(lr=lr, schedule=schedule, weight_decay=weight_decay, loss=loss)
        live = [i for i, x in enumerate(xs) if x.numel()]
        gs = [flags.centralize(g) if on.centralize else g for g in gs]
        together = getattr(self.oracles[0], "together", None)
        if together:
            together([self.oracles[i] for i in live], [gs[i] for i in live])
        self.slow = self.slow or list(xs)
        new = list(xs)
        for i in live:
            x, oracle = xs[i], self.oracles[i]
            out = oracle.direction(x, gs[i], step)
            u, alpha = out if isinstance(out, tuple) else (out, lr)
            where = 0.0 if getattr(oracle, "decays", False) else flags.decay_mask(x, u, on.decay)
            u = flags.cautious(u, gs[i], on.cautious_floor) if on.cautious else u
            new[i] = x - alpha * weight_decay * where * x - alpha * u
            if on.lookahead and self.t % on.lookahead_k == 0:
                new[i] = self.slow[i] = self.slow[i] + on.lookahead_alpha * (new[i] - self.slow[i])
        return new
