# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SM3-II, arXiv 1901.11150, with the exponential average (beta) and momentum of the authors' notes."""

import torch


class Oracle:
    def __init__(self, shape, momentum=0.0, beta=0.0):
        self.mu, self.beta = momentum, beta
        self.M = 0.0
        # one accumulator per slice of every axis (kept broadcastable); vectors and scalars: one per entry
        self.axes = range(len(shape)) if len(shape) > 1 else [None]
        self.A = {a: torch.zeros(()).double() for a in self.axes}

    def direction(self, X, G, step):
        least = self.A[self.axes[0]]
        for a in self.axes:
            least = torch.minimum(least, self.A[a])
        nu = self.beta * least + (1 - self.beta) * G**2 if self.beta else least + G**2
        U = torch.where(nu > 0, G / torch.sqrt(nu), 0.0)  # 0 / 0 := 0
        for a in self.axes:
            others = [k for k in range(G.dim()) if k != a]
            self.A[a] = nu if a is None else nu.amax(others, keepdim=True)
        if self.mu:
            self.M = self.mu * self.M + (1 - self.mu) * U
            U = self.M
        return U


CASES = [{"momentum": 0.9}, {"beta": 0.9}, {"beta": 0.99, "momentum": 0.5}]
NEEDS = {"cautious": {"momentum": 0.9}}
