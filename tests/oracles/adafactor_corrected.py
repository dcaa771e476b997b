# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Adafactor, arXiv 1804.04235, with an average of the clipped update (beta1) that is free of the step size."""

import torch


class Oracle:
    def __init__(
        self,
        shape,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
        clip_threshold=1.0,
        decay_rate=0.8,
        beta1=None,
        eps1=1e-30,
        eps2=1e-3,
    ):
        self.relative, self.scaled, self.warmup = relative_step, scale_parameter, warmup_init
        self.d, self.decay_rate, self.beta1, self.eps1, self.eps2 = clip_threshold, decay_rate, beta1, eps1, eps2
        # the two longest axes, the later one of a tie
        self.axes = sorted(sorted(range(len(shape)), key=lambda a: (shape[a], a))[-2:])
        self.V = self.r = self.c = self.M = 0.0
        self.t = 0

    def direction(self, X, G, step):
        self.t += 1
        w = self.t**-self.decay_rate
        Q = G * G + self.eps1
        if G.dim() < 2:
            self.V = (1 - w) * self.V + w * Q
            V_hat = self.V
        else:
            a, b = self.axes
            self.r = (1 - w) * self.r + w * Q.mean(b, keepdim=True)
            self.c = (1 - w) * self.c + w * Q.mean(a, keepdim=True)
            V_hat = self.r * self.c / self.r.mean(a, keepdim=True)
        U = G / torch.sqrt(V_hat)
        U = U / max(1.0, rms(U) / self.d)
        if self.beta1 is not None:
            self.M = self.beta1 * self.M + (1 - self.beta1) * U
            U = self.M
        rho = step.lr
        if self.relative:
            rho = step.schedule * min(1e-6 * self.t if self.warmup else 1e-2, 1 / self.t**0.5)
        return U, rho * max(self.eps2, rms(X)) if self.scaled else rho

    def second_moment(self):
        return self.r if len(self.axes) > 1 else self.V  # the rows' means have the mean of all


def rms(A):
    return (A.square().sum() / A.numel()).sqrt().item()


CASES = [
    {"relative_step": True},
    {"relative_step": True, "warmup_init": True},
    {"scale_parameter": True},
    {"scale_parameter": True, "eps2": 2.0},
    {"relative_step": True, "scale_parameter": True, "beta1": 0.9},
    {"clip_threshold": 0.5},
    {"decay_rate": 0.5},
    {"beta1": 0.8},
    {"beta1": 0.5, "clip_threshold": 0.9},
    {"eps1": 0.1},
]
NEEDS = {"cautious": {"beta1": 0.9}}
