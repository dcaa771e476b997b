# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamW, arXiv 1711.05101, with torch's decay (multiplied by all of the learning rate)."""

import torch

from . import flags


class Oracle:
    def __init__(self, shape, beta1=0.9, beta2=0.999, **ratio):
        self.beta1, self.beta2, self.ratio = beta1, beta2, flags.ratio(**ratio)
        self.m, self.v, self.t = torch.zeros(shape).double(), torch.zeros(shape).double(), 0

    def direction(self, x, g, step):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return self.ratio(m_hat, torch.sqrt(v_hat))


CASES = [{"beta1": 0.5}, {"beta1": 0.0}, {"beta2": 0.9}]
