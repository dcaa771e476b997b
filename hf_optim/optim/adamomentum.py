# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdaMomentum: Adam whose second average is of the first one's square."""

from ..core import hp, like
from .adamw import AdamW


class AdaMomentum(AdamW):
    """Divide by the root of the average squared momentum.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) m^2 + eps              corrected: (m / (1 - beta1^t))^2, not m^2
        p <- p - lr weight_decay p - lr (m / (1 - beta1^t)) / sqrt(v / (1 - beta2^t))

    The first steps are large, the first 1 / (1 - beta1) lr, because m is corrected and the m in v is not: warm lr
    up, or use `v_input=corrected`, which is not in the paper and steps by exactly lr for a constant gradient. eps is
    added at every step, so the root is at least sqrt(eps / (1 - beta2)): 3e-3 for 1e-8, more than the gradients of a
    language model; hence 1e-16 here. Where eps goes and the paper's 1e-8 are unverified against its text.
    https://huggingface.co/papers/2106.11514
    """

    eps: float = hp(1e-16, "added to the average squared momentum at every step", gt=0)
    v_input: str = hp("momentum", "what is squared", choices=("momentum", "corrected"))

    uses_ratio = False

    @staticmethod
    def init(p, h):
        return {"m": like(p), "v": like(p, positive=True)}

    @staticmethod
    def update(g, p, s, h):
        s.m = s.m.lerp(g, 1 - h.beta1)
        m_hat = s.m * h.debias1
        s.v = s.v.lerp((s.m if h.v_input == "momentum" else m_hat).square(), 1 - h.beta2) + h.eps
        return m_hat / (s.v.sqrt() * h.debias2)

    @staticmethod
    def refuses(h):
        return AdamW.refuses(h) | {"amsgrad": "the paper has no such form"}
