# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SMMF, arXiv 2412.08894, with a row-preserving matrix unless `matricize="square"`."""

import math

import torch

from . import flags


class Oracle:
    def __init__(self, shape, beta1=0.9, growth=0.999, decay_rate=-0.5, matricize="rows", **ratio):
        self.beta, self.lam, self.gamma, self.ratio = beta1, growth, decay_rate, flags.ratio(**ratio)
        numel = math.prod(shape)
        if matricize == "square":
            b = max(d for d in range(1, math.isqrt(numel) + 1) if numel % d == 0) if numel else 1
            a = numel // b
        else:
            a = shape[0] if shape else 1
            b = numel // a if a else 0
        zeros = torch.zeros(a).double(), torch.zeros(b).double()
        self.size, self.M, self.V, self.S, self.t = (a, b), zeros, zeros, -1.0, 0

    def direction(self, X, G, step):
        self.t += 1
        G_bar = G.reshape(self.size)
        beta1 = (self.beta or 0.0) * self.lam ** (self.t - 1)
        beta2 = 1 - self.t**self.gamma
        M = beta1 * self.S * decompress(*self.M) + (1 - beta1) * G_bar
        V = beta2 * decompress(*self.V) + (1 - beta2) * G_bar**2
        self.M, self.V, self.S = compress(M.abs()), compress(V), (M > 0).double() * 2 - 1
        return self.ratio(M, torch.sqrt(V)).reshape(G.shape)


def compress(A):
    r, c = A.sum(1), A.sum(0)
    short = c if len(c) <= len(r) else r
    if short.sum() > 0:
        short /= short.sum().clone()
    return r, c


def decompress(r, c):
    return torch.outer(r, c)


CASES = [
    {"beta1": 0.5},
    {"beta1": None},
    {"growth": 0.95},
    {"growth": 1.0, "decay_rate": -0.8},
    {"matricize": "square"},
]
NEEDS = {"softplus_bias": None}
