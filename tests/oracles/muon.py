# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Muon (Jordan; arXiv 2502.16982): orthogonalised momentum of matrices, AdamW for what is not a matrix."""

import torch

from . import adamw


class Oracle(adamw.Oracle):
    def __init__(
        self,
        shape,
        beta2=0.95,
        momentum=0.95,
        nesterov=True,
        scale="match_rms",
        steps=5,
        iterate_in="auto",
        rule="auto",
        **options,
    ):
        super().__init__(shape, beta2=beta2, **options)
        self.mu, self.nesterov, self.scale, self.K = momentum, nesterov, scale, steps
        self.hidden, self.B = len(shape) > 1 and rule != "adamw", torch.zeros(shape).double()

    def direction(self, x, g, step):
        if not self.hidden:
            return super().direction(x, g, step)
        self.B = self.mu * self.B + (1 - self.mu) * g
        G = self.mu * self.B + (1 - self.mu) * g if self.nesterov else self.B
        if g.dim() == 3:  # stacked experts
            return torch.stack([self.orthogonal(matrix) for matrix in G])
        return self.orthogonal(G.reshape(len(g), -1)).reshape(g.shape)

    def orthogonal(self, G):
        """U f(S) V^T of the singular value decomposition: what the iteration does to each singular value."""
        out, fan_in = G.shape
        size = 0.2 * max(out, fan_in) ** 0.5 if self.scale == "match_rms" else max(1.0, out / fan_in) ** 0.5
        if not G.any():
            return G
        U, S, Vh = torch.linalg.svd(G / G.norm(), full_matrices=False)
        for _ in range(self.K):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        return size * U @ torch.diag(S) @ Vh


BAR = 5e-6  # products of matrices, whose sums are taken in an order of the machine's own
# `beta1` and `amsgrad` act on the vectors
CASES = [
    *adamw.CASES,
    {"momentum": 0.8},
    {"nesterov": False},
    {"scale": "original"},
    {"steps": 2},
    {"rule": "adamw"},
    {"rule": "adamw", "beta1": 0.5},
    {"nesterov": False, "scale": "original", "momentum": 0.5},
]
APPROXIMATE = [{"iterate_in": "bfloat16"}]
