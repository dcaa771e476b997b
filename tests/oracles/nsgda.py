# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""nSGDA, arXiv 2210.04319: momentum over its norm, of the tensor or of the model; decoupled decay."""

import math

import torch


class Oracle:
    def __init__(self, shape, momentum=0.9, eps=1e-8, scope="tensor", scale="norm"):
        self.mu, self.eps, self.scope, self.scale = momentum, eps, scope, scale
        self.M, self.t = torch.zeros(shape).double(), 0

    @staticmethod
    def together(oracles, gs):
        for o, g in zip(oracles, gs):
            o.t += 1
            o.M = o.mu * o.M + (1 - o.mu) * g
        for o in oracles:
            members = [o] if o.scope == "tensor" else oracles
            o.d = math.sqrt(sum(k.M.square().sum().item() for k in members))
            o.N = sum(k.M.numel() for k in members)

    def direction(self, X, G, step):
        bias = 1 - self.mu**self.t
        M_hat = self.M / bias
        size = math.sqrt(self.N) if self.scale == "rms" else 1.0
        return size * M_hat / (self.d / bias + self.eps)


CASES = [
    {"momentum": 0.5},
    {"momentum": 0.0},
    {"eps": 0.3},
    {"scope": "model"},
    {"scale": "rms"},
    {"scope": "model", "scale": "rms", "momentum": 0.8},
]
