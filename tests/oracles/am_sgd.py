# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AM-MSGD, arXiv 2510.04988, in the dual form: one coefficient for the model or for each tensor."""


class Oracle:
    def __init__(self, shape, pull=0.1, cap=0.89, scope="model"):
        self.lambda_m, self.beta_max, self.scope = pull, cap, scope
        self.d = None

    @staticmethod
    def together(oracles, gs):
        """beta = clip([(1 + lambda_m) <g, d> - <d - g, g + lambda_m d>] / ||d - g||^2); 0 where d = g."""
        for o, g in zip(oracles, gs):
            o.g, o.d = g, g if o.d is None else o.d
        for o in oracles:
            members = [o] if o.scope == "tensor" else oracles
            lam = o.lambda_m
            num = sum(((1 + lam) * k.g * k.d - (k.d - k.g) * (k.g + lam * k.d)).sum().item() for k in members)
            den = sum((k.d - k.g).square().sum().item() for k in members)
            o.beta = min(max(num / den, 0.0), o.beta_max) if den else 0.0

    def direction(self, x, g, step):
        self.d = ((self.beta + self.lambda_m) * self.d + (1 - self.beta) * g) / (1 + self.lambda_m)
        return self.d


CASES = [{"pull": 1.0}, {"pull": 0.0}, {"cap": 0.3}, {"scope": "tensor"}, {"scope": "tensor", "pull": 0.5}]
BASE = {"lr": 0.03}  # 0.3 carries weights far away and back: the rounding of the way is left then
