# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""NAdam (Dozat, 2016) as torch has it, whose m is averaged with a constant beta1; decoupled decay."""

import math

from . import adamw


class Oracle(adamw.Oracle):
    def __init__(self, shape, momentum_decay=4e-3, **options):
        super().__init__(shape, **options)
        self.psi, self.mus = momentum_decay, []

    def mu(self, t):
        return self.beta1 * (1 - 0.5 * 0.96 ** (t * self.psi))

    def direction(self, x, g, step):
        _, root, correction = self.moments(g)
        self.mus.append(self.mu(self.t))
        ahead = self.mu(self.t + 1)
        m_hat = (1 - self.mus[-1]) * g / (1 - math.prod(self.mus)) + ahead * self.m / (1 - math.prod(self.mus) * ahead)
        return self.ratio(m_hat, root, correction)


CASES = [*adamw.CASES, {"momentum_decay": 0.5}, {"momentum_decay": 0.0, "beta1": 0.95}]
