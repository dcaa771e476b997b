# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamW, arXiv 1711.05101, with torch's decay (multiplied by all of the learning rate); AMSGrad, arXiv 1904.09237."""

import torch

from . import flags


class Oracle:
    def __init__(self, shape, beta1=0.9, beta2=0.999, amsgrad=False, **ratio):
        self.beta1, self.beta2, self.amsgrad, self.ratio = beta1, beta2, amsgrad, flags.ratio(**ratio)
        self.m, self.v, self.s, self.t = *(torch.zeros(shape).double() for _ in "mvs"), 0

    def moments(self, g, fresh=None):
        """m_hat (of `fresh`, if it is not the gradient), the root of v_hat, and that root's correction."""
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * (g if fresh is None else fresh)
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        self.s = torch.maximum(self.s, self.v) if self.amsgrad else self.v
        return self.m / (1 - self.beta1**self.t), torch.sqrt(self.second_moment()), (1 - self.beta2**self.t) ** 0.5

    def second_moment(self):
        """v_hat, or its largest value before the correction."""
        return self.s / (1 - self.beta2**self.t)

    def direction(self, x, g, step):
        return self.ratio(*self.moments(g))


CASES = [{"beta1": 0.5}, {"beta1": 0.0}, {"beta2": 0.9}, {"amsgrad": True, "beta2": 0.9}]
