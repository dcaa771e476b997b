# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Constrained parameter regularisation."""

import torch

from ..core import Flag, averaged, hp, keep, rms


class CPR(Flag):
    """Instead of decay: hold a measure R of every matrix below a bound kappa of its own, by a multiplier that adapts.

        lambda <- max(0, lambda + cpr_rate (R - kappa)),  p <- p - lambda dR      both of p after the optimizer's step

        cpr_reg            R                                        dR
        l2, l1             mean p^2, mean |p|                       2 p, sign p
        huber              mean of p^2 / 2 or, beyond 1, |p| - 1/2  p clipped to [-1, 1]
        std                std p                                    (p - mean p) / ((n - 1) std p)

        cpr_init           kappa
        uniform            cpr_kappa
        dependent          cpr_kappa R of the first weights; none for weights that start at 0, such as LoRA's B
        warm_start         R after cpr_steps steps
        inflection_point   R when its average grew less over cpr_steps steps than over the cpr_steps before

    R is a mean, so kappa is a size per entry (the authors' code sums, at rate / n: the same). Vectors are left alone,
    and embeddings if the optimizer is built from the model. As in that code R is of the new weights (the paper's
    figure says the old) and lr plays no part; `cpr_cap` is ours: without it weights of unit scale are wiped out or
    turned over (lower cpr_rate). How the inflection is found is ours. https://huggingface.co/papers/2311.09058
    """

    flag, value, stage, elementwise = "decay", "cpr", "parameter", False
    cpr_reg: str = hp("l2", "the measure that is bounded", choices=("l2", "l1", "huber", "std"))
    cpr_init: str = hp(
        "inflection_point",
        "where the bound comes from",
        choices=("uniform", "dependent", "warm_start", "inflection_point"),
    )
    cpr_kappa: float = hp(1.0, "the bound (uniform), or its share of the first R (dependent)", gt=0)
    cpr_steps: int = hp(200, "steps before the bound is taken, or between two looks at the growth", ge=1)
    cpr_rate: float = hp(1.0, "step size of the multiplier", gt=0)
    cpr_cap: float = hp(0.5, "largest share of the norm of the weights that one step takes off", gt=0, le=1)

    @staticmethod
    def refuses(h):
        waits = h.cpr_init in ("warm_start", "inflection_point")
        idle = {"cpr_kappa": f"`cpr_init={h.cpr_init}`"} if waits else {"cpr_steps": f"`cpr_init={h.cpr_init}`"}
        return {"weight_decay": "`decay=cpr` takes its place", **idle}

    @staticmethod
    def init(p, h):
        names = ["cpr_bound", "cpr_bounded", "cpr_lambda"]
        names += ["cpr_mean", "cpr_last", "cpr_growth"] if h.cpr_init == "inflection_point" else []
        return {name: keep(p) for name in names} if p.ndim > 1 else {}

    @staticmethod
    def scalars(t, h):
        first, look = float(t == 1), float(t % h.cpr_steps == 0)
        third = look * (t >= 3 * h.cpr_steps)  # the first look that has two growths to compare
        return {"cpr_first": first, "cpr_at": float(t == h.cpr_steps), "cpr_look": look, "cpr_third": third,
                "cpr_fresh": max(first, 0.01)}  # fmt: skip

    @staticmethod
    def apply(p, c):
        if p.ndim < 2:
            return p
        s, h = c.s, c.h
        size, slope, shrunk = measure(p, h.cpr_reg)
        found, bound = find_bound(size, c)
        found = found * (1 - s.cpr_bounded)
        s.cpr_bound = s.cpr_bound.lerp(bound, found)
        s.cpr_bounded = s.cpr_bounded + found
        s.cpr_lambda = (s.cpr_lambda + h.cpr_rate * s.cpr_bounded * (size - s.cpr_bound)).clamp(min=0.0)
        step = s.cpr_lambda * slope
        return p - step * (h.cpr_cap * rms(shrunk) / rms(step).clamp(min=1e-30)).clamp(max=1.0)

    @staticmethod
    def options_for(at, h):
        return {"decay": "decoupled"} if isinstance(at.module, torch.nn.Embedding) else {}


def measure(p, kind):
    """R and dR of a matrix, and what a step takes its share of."""
    if kind == "l2":
        return averaged(p.square()), 2 * p, p
    if kind == "l1":
        return averaged(p.abs()), p.sign(), p
    if kind == "huber":
        slope = p.clamp(-1.0, 1.0)
        return averaged(slope * (p - slope / 2)), slope, p
    off, n = p - averaged(p), max(p.numel() - 1, 1)
    std = (off.square().sum() / n).sqrt()
    return std, off / (n * std.where(std > 0, 1.0)), off


def find_bound(size, c):
    """(1 where the bound is known now, the bound)."""
    s, h = c.s, c.h
    if h.cpr_init == "uniform":
        return h.cpr_first, 0 * size + h.cpr_kappa
    if h.cpr_init == "dependent":
        first = measure(c.p, h.cpr_reg)[0]
        return h.cpr_first * (first > 0), h.cpr_kappa * first
    if h.cpr_init == "warm_start":
        return h.cpr_at, size
    s.cpr_mean = s.cpr_mean.lerp(size, h.cpr_fresh)
    growth = s.cpr_mean - s.cpr_last
    found = h.cpr_third * (s.cpr_growth > growth)
    s.cpr_growth, s.cpr_last = s.cpr_growth.lerp(growth, h.cpr_look), s.cpr_last.lerp(s.cpr_mean, h.cpr_look)
    return found, size
