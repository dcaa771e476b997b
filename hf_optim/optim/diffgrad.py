# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""diffGrad: smaller steps where the gradient stands still."""

from ..core import hp, like
from .adamw import AdamW


class DiffGrad(AdamW):
    """AdamW times a friction between 1/2 and 1 that grows with the change of the gradient.

        xi = 1 / (1 + exp(-|g_prev - g|))                     relative: |g_prev - g| / (sqrt(v_hat) + 1e-30)
        p <- p - lr weight_decay p - lr xi m_hat / (sqrt(v_hat) + eps);  g_prev <- g

    with m_hat and v_hat of AdamW. The change is absolute: gradients of language models are so small that xi is 1/2 and
    this is AdamW at half the lr; `relative=true`, not in the paper, measures it in units of the usual gradient. It
    depends on the scale of the loss. The first step compares with 0. eps is added after the bias correction, as in
    AdamW; decay is decoupled. https://huggingface.co/papers/1909.11015
    """

    relative: bool = hp(False, "measure the change in units of the root mean square gradient")

    @staticmethod
    def init(p, h):
        return AdamW.init(p, h) | {"g_prev": like(p)}

    @staticmethod
    def update(g, p, s, h):
        s.m = s.m.lerp(g, 1 - h.beta1)
        root = AdamW.root(g, s, h)
        change = (s.g_prev - g).abs()
        s.g_prev = g
        xi = (change / (root + 1e-30) if h.relative else change).sigmoid()
        return h.ratio(xi * s.m * h.debias1, root)

    @staticmethod
    def refuses(h):
        return {}  # unlike AdamW's, the update is no multiple of the gradient
