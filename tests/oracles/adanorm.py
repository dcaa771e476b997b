# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdaNorm, arXiv 2210.06364, with a largest factor; a zero gradient stays zero."""

from . import adamw


class Oracle(adamw.Oracle):
    def __init__(self, shape, gamma=0.95, largest=10.0, **options):
        super().__init__(shape, **options)
        self.gamma, self.largest, self.e = gamma, largest, 0.0

    def direction(self, x, g, step):
        norm = g.square().sum().sqrt().item()
        self.e = self.gamma * self.e + (1 - self.gamma) * norm
        s = min(self.e / norm, self.largest) * g if 0 < norm < self.e else g
        return self.ratio(*self.moments(g, fresh=s))


CASES = [*adamw.CASES, {"gamma": 0.5}, {"gamma": 0.5, "largest": 1.05}]
