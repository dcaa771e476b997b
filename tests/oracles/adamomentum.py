# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdaMomentum, arXiv 2106.11514: the second average is of the momentum, and eps joins it at every step."""

import torch


class Oracle:
    def __init__(self, shape, beta1=0.9, beta2=0.999, eps=1e-16, v_input="momentum"):
        self.beta1, self.beta2, self.eps, self.v_input = beta1, beta2, eps, v_input
        self.m, self.v, self.t = torch.zeros(shape).double(), torch.zeros(shape).double(), 0

    def second_moment(self):
        return self.v / (1 - self.beta2**self.t)

    def direction(self, x, g, step):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        m_hat = self.m / (1 - self.beta1**self.t)
        square = m_hat**2 if self.v_input == "corrected" else self.m**2
        self.v = self.beta2 * self.v + (1 - self.beta2) * square + self.eps
        return m_hat / torch.sqrt(self.second_moment())


CASES = [
    {"beta1": 0.5},
    {"beta1": 0.0},
    {"beta2": 0.9},
    {"eps": 1e-3},
    {"v_input": "corrected"},
    {"v_input": "corrected", "beta2": 0.9, "eps": 1e-4},
]
