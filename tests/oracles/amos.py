# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Amos, arXiv 2210.11693. xi is divided out of U and multiplies last; lambda is xi times `weight_decay`."""

import math

import torch


class Oracle:
    decays = True

    def __init__(self, shape, beta=0.999, c_coef=0.25, d_coef=0.25, momentum=0.0, clip=None, eta=None, output_axis=0):
        self.beta, self.c_coef, self.d_coef, self.mu, self.clip = beta, c_coef, d_coef, momentum, clip
        matrix = len(shape) > 1
        self.S = [a for a in range(len(shape)) if not matrix or a != output_axis]  # the axes averaged over
        fan_in = math.prod(shape) / shape[output_axis] if matrix and math.prod(shape) else 1
        self.eta = eta or (1 / math.sqrt(fan_in) if matrix else 0.5)
        self.v = self.b = self.M = 0.0
        self.t = 0

    def direction(self, X, G, step):
        self.t += 1
        xi, eta = step.lr, self.eta
        if self.clip is not None:
            G = torch.clamp(G, -self.clip, self.clip)
        q = (G * G).mean(self.S, keepdim=True) if self.S else G * G
        self.v = self.beta * self.v + (1 - self.beta) * q
        rho = (1 - self.beta**self.t) / torch.clamp(self.v, min=2.0**-125)
        c = (1 + self.c_coef * math.sqrt(xi) * self.b) ** -0.5
        d = 1 / (1 + self.d_coef * math.sqrt(xi * eta) * self.b)
        gamma = c * xi**2 * rho * q
        U = d * (xi * eta * torch.sqrt(rho) * G + (gamma / 2 + xi * step.weight_decay) * X) / xi
        self.b = self.b + gamma * (1 + self.b)
        if self.mu:
            self.M = self.mu * self.M + (1 - self.mu) * U
            U = self.M
        return U


CASES = [
    {"beta": 0.9},
    {"c_coef": 20.0, "d_coef": 0.0},
    {"d_coef": 20.0, "c_coef": 1.0},
    {"momentum": 0.9},
    {"clip": 0.5},
    {"eta": 0.2},
    {"output_axis": 1, "momentum": 0.5},
]
NEEDS = {"cautious": {"momentum": 0.9}}
TRANSPOSE = {"output_axis": 1}
