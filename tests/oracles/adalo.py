# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdaLo, Information Sciences 690, 121607: the two modes of the public code and the rule of its early note."""

import math

import torch


class Oracle:
    def __init__(self, shape, beta1=0.9, beta2=0.999, kappa=3.0, eps=1e-8, mode="adversarial", follow_schedule=False):
        self.beta1, self.beta2, self.kappa, self.eps, self.mode = beta1, beta2, kappa, eps, mode
        self.follow_schedule = follow_schedule
        self.M, self.E = torch.zeros(shape).double(), 0.0

    def direction(self, X, G, step):
        self.M = self.beta1 * self.M + (1 - self.beta1) * G
        L = float(step.loss)
        if math.isfinite(L):
            L = max(L, 0.0)
            squashed = (math.tanh(-math.log1p(L) / 2) + 1) / 2
            self.E = self.beta2 * self.E + (1 - self.beta2) * (L / self.kappa if self.mode == "loss" else squashed)
        rate = {"adversarial": self.E / self.kappa, "compliant": (1 - self.E) / self.kappa, "loss": self.E}
        alpha = max(rate[self.mode], self.eps)
        return self.M, alpha * step.schedule if self.follow_schedule else alpha


CASES = [
    {"beta1": 0.5},
    {"beta2": 0.9},
    {"kappa": 1.0, "beta2": 0.9},
    {"eps": 0.01},
    {"mode": "compliant"},
    {"mode": "loss", "kappa": 30.0, "beta2": 0.99},
    {"follow_schedule": True, "beta2": 0.9},
]
