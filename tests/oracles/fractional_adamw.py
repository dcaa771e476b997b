# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""FCAdam_G-L, Mathematics 11(2), 316, without its random gap; two exponential sums instead of its ten gradients."""

import math
from fractions import Fraction

from . import adamw


class Oracle(adamw.Oracle):
    def __init__(self, shape, alpha=0.5, memory="exponential", **options):
        super().__init__(shape, **options)
        self.w, self.memory, self.past = kernel(alpha), memory, []
        self.terms = prony(self.w) if memory == "exponential" else None

    def direction(self, x, g, step):
        # every gradient so far, newest first: 40 or 200 of them are no burden here
        weights = self.w if self.memory == "window" else [self.decayed(j) for j in range(1, len(self.past) + 1)]
        D = g + sum(w * old for w, old in zip(weights, self.past))
        self.past.insert(0, g)
        return super().direction(x, D, step)

    def decayed(self, j):
        return sum(C * rho ** (j - 1) for C, rho in self.terms)


def kernel(alpha):
    """w_1 ... w_10 with w_0 = 1, from their closed form: w_j is the product of (i - alpha) / (i + 1) over i <= j."""
    return [math.prod((i - alpha) / (i + 1) for i in range(1, j + 1)) for j in range(1, 11)]


def prony(w):
    """The two exponentials through ten weights: rates from w_{j+2} ~ a w_{j+1} + b w_j, then their amplitudes."""
    if not any(w):
        return [(0.0, 0.0), (0.0, 0.0)]
    w = [Fraction(x) for x in w]
    a, b = map(float, least_squares(w[1:9], w[:8], w[2:]))
    root = math.sqrt(a * a + 4 * b)
    rates = [Fraction((a - root) / 2), Fraction((a + root) / 2)]
    C = least_squares(*([rho**j for j in range(10)] for rho in rates), w)
    return [(float(c), float(rho)) for c, rho in zip(C, rates)]


def least_squares(p, q, y):
    """The a and b that make a p + b q nearest to y, by the normal equations in exact arithmetic."""

    def dot(u, v):
        return sum(x * z for x, z in zip(u, v))

    pp, pq, qq, py, qy = dot(p, p), dot(p, q), dot(q, q), dot(p, y), dot(q, y)
    det = pp * qq - pq * pq
    return (py * qq - qy * pq) / det, (pp * qy - pq * py) / det


CASES = [
    *adamw.CASES,
    {"alpha": 0.1},
    {"alpha": 1.0},
    {"memory": "window"},
    {"memory": "window", "alpha": 0.3},
]
