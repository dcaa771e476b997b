# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""diffGrad, arXiv 1909.11015, with eps after the bias correction; `relative` is not in the paper."""

import torch

from . import adamw


class Oracle(adamw.Oracle):
    def __init__(self, shape, relative=False, **options):
        super().__init__(shape, **options)
        self.relative, self.previous = relative, torch.zeros(shape).double()

    def direction(self, x, g, step):
        m_hat, root, correction = self.moments(g)
        change = torch.abs(self.previous - g)
        xi = 1 / (1 + torch.exp(-(change / (root + 1e-30) if self.relative else change)))
        self.previous = g.clone()
        return self.ratio(xi * m_hat, root, correction)


CASES = [*adamw.CASES, {"relative": True}, {"relative": True, "beta2": 0.9}]
