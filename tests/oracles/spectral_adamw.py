# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamW2, arXiv 2505.21910: each matrix's step is capped at a share of its spectral norm (two power iterations)."""

import torch

from . import adamw


class Oracle(adamw.Oracle):
    def __init__(self, shape, tau=0.01, floor=1e-3, **options):
        super().__init__(shape, **options)
        self.tau, self.floor, self.right = tau, floor, {}

    def sigma(self, W, key):
        """The largest singular value from below; the right singular vector is kept for the next step."""
        x = self.right.get(key, torch.sin(torch.arange(1, W.shape[1] + 1).double()))
        for _ in range(2):
            left = W @ x
            if left.norm() == 0:
                return 0.0
            x = W.T @ (left / left.norm())
            s = x.norm()
            x = self.right[key] = x / s
        return s.item()

    def direction(self, x, g, step):
        U = super().direction(x, g, step)
        if x.dim() < 2 or self.tau is None:
            return U
        rows, columns = len(x), x.numel() // len(x)
        s_W, s_U = self.sigma(x.reshape(rows, -1), "W"), self.sigma(U.reshape(rows, -1), "U")
        s_floor = self.floor * (rows**0.5 + columns**0.5)  # sigma of a matrix of noise of that root mean square
        if step.lr * s_U == 0:
            return U
        return U * min(step.lr, self.tau * max(s_W, s_floor) / s_U) / step.lr


CASES = [*adamw.CASES, {"tau": 0.004}, {"tau": None}, {"floor": 3.0}, {"tau": 0.003, "beta1": 0.5}]
BASE = {"tau": 0.002}  # the default does not bind on weights of N(0, 1)
NEEDS = {"trust_ratio": None}
TRANSPOSE = None  # the vectors that are iterated start from the columns
