# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamW with adaptive memory."""

from ..core import Optimizer, hp, keep, like


class AMAdamW(Optimizer):
    """AdamW whose first coefficient is found for each tensor at every step.

        v <- beta2 v + (1 - beta2) g^2
        P = (1 - cap pi) (sqrt(v / (1 - beta2^t)) + eps),  M = 1 / (P (1 + pull P)),  q = d - g
        beta = [ (1 + w lr) (lr_prev / lr) <g, d / P + w p> - <q, (g + pull P d) M> - w <p, q> ] / <q, q M>
        beta <- clip(beta, 0, cap);  cap at the first step, 0 where <q, q M> = 0
        d <- ((1 - beta) g + (pull P + beta) d) / (1 + pull P),  pi <- beta pi
        p <- p - lr w p - lr d / P                            w: weight_decay; 0 with decay=coupled, which is in g

    beta is the dual variable of the memory plane in the metric of P; see `am_sgd`. pi, the product of past betas,
    corrects the bias of d. https://huggingface.co/papers/2510.04988. The text of the paper was not available: closed
    form and constants are those of an independent implementation, checked against brute-force minimisation; its first
    step and the coefficient per tensor are unverified.
    """

    beta2: float = hp(0.999, "decay of the average squared gradient", ge=0, lt=1)
    pull: float = hp(0.1, "pull towards the previous direction", ge=0)
    cap: float = hp(0.89, "largest weight of the memory plane", ge=0, lt=1)
    eps: float = hp(1e-8, "added to the denominator", gt=0)

    needs_matrix = True

    @staticmethod
    def init(p, h):
        return {"d": like(p), "v": like(p, positive=True), "pi": keep(p), "lr_prev": keep(p)}

    @staticmethod
    def scalars(t, h):
        later = float(t > 1)
        return {"debias2": (1 - h.beta2**t) ** -0.5, "later": later, "per_lr": later / h.lr if h.lr else 0.0}

    @staticmethod
    def update(g, p, s, h):
        s.v = s.v.lerp(g.square(), 1 - h.beta2)
        pi = s.pi * h.later + (1 - h.later)
        P = (1 - h.cap * pi) * (s.v.sqrt() * h.debias2 + h.eps)
        pulled, q = h.pull * P, s.d - g
        w = 0.0 if h.decay == "coupled" else h.weight_decay
        M = 1 / (P * (1 + pulled))
        gain = (1 + w * h.lr) * s.lr_prev * h.per_lr * (g * (s.d / P + w * p)).sum()
        gain = gain - (q * (g + pulled * s.d) * M).sum() - w * (p * q).sum()
        gap = (q.square() * M).sum()
        beta = (gain * h.later / gap.where(gap > 0, 1.0)).clamp(0.0, h.cap).where(gap > 0, 0.0)
        beta = beta * h.later + h.cap * (1 - h.later)
        s.d = ((1 - beta) * g + (pulled + beta) * s.d) / (1 + pulled)
        s.pi, s.lr_prev = beta * pi, 0 * s.lr_prev + h.lr
        return s.d / P

    @staticmethod
    def second_moment(s, h):
        return s.v * h.debias2**2
