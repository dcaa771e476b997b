# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AM-AdamW, arXiv 2510.04988: one coefficient per tensor, in the metric of the preconditioner P."""

import torch


class Oracle:
    def __init__(self, shape, beta2=0.999, pull=0.1, cap=0.89, eps=1e-8):
        self.beta2, self.lambda_m, self.beta_max, self.eps = beta2, pull, cap, eps
        self.d, self.v = torch.zeros(shape).double(), torch.zeros(shape).double()
        self.pi, self.eta_prev, self.t = 1.0, None, 0

    def second_moment(self):
        return self.v / (1 - self.beta2**self.t)

    def direction(self, x, g, step):
        self.t += 1
        eta, lam = step.lr, step.weight_decay
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        P = (1 - self.beta_max * self.pi) * (torch.sqrt(self.second_moment()) + self.eps)
        beta = self.beta_max if self.t == 1 else self.dual(x, g, P, eta, lam)
        self.d = ((1 - beta) * g + (self.lambda_m * P + beta) * self.d) / (1 + self.lambda_m * P)
        self.pi, self.eta_prev = self.pi * beta, eta
        return self.d / P

    def dual(self, x, g, P, eta, lam):
        """The weight of the memory plane, without a first term where the step size is 0."""
        M, d, q = 1 / (P * (1 + self.lambda_m * P)), self.d, self.d - g
        den = (q * q * M).sum().item()
        if den == 0:
            return 0.0
        num = -(q * (g + self.lambda_m * P * d) * M).sum().item() - lam * (x * q).sum().item()
        if eta:
            num += (1 + lam * eta) * self.eta_prev / eta * (g * (d / P + lam * x)).sum().item()
        return min(max(num / den, 0.0), self.beta_max)


CASES = [{"beta2": 0.9}, {"pull": 2.0}, {"pull": 0.0, "cap": 0.5}, {"cap": 0.3}, {"eps": 0.1}]
