# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SGDS, arXiv 2011.11152: torch's momentum SGD; the decay is what flags.py says about `decay=stable`."""

import torch


class Oracle:
    def __init__(self, shape, momentum=0.9, dampening=0.0):
        self.mu, self.damp = momentum, dampening
        self.b = None

    def gain(self):
        return (1 - self.damp) / (1 - self.mu)

    def direction(self, x, g, step):
        self.b = torch.clone(g) if self.b is None else self.mu * self.b + (1 - self.damp) * g
        return self.b if self.mu else g


BAR = 1e-5  # 200 steps as large as this rule's round more than AdamW's; float64 is exact
CASES = [{"momentum": 0.5}, {"momentum": 0.0}, {"dampening": 0.5}]
BASE = {"lr": 0.03}  # 0.3 carries weights far away and back: the rounding of the way is left then
