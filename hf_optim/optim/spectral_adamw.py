# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdamW whose steps are bounded by the spectral norm of the weights."""

import torch

from ..core import Slot, beside, hp
from .adamw import AdamW


class SpectralAdamW(AdamW):
    """AdamW that needs no warm-up: a step may change the largest singular value of a matrix by a share tau at most.

        u = m_hat / (sqrt(v_hat) + eps)                            as in AdamW
        alpha = min(lr, tau max(sigma(p), floor_p) / sigma(u))     matrices; lr for everything else
        p <- p - lr weight_decay p - alpha u                       so sigma(p) grows by (1 + tau) at most

    sigma, the largest singular value, comes from two power iterations a step on vectors that are kept. Tensors of more
    dimensions are seen as (first axis, rest). Embeddings and output layer are not bounded if the optimizer is built
    from the model. `floor` is the root mean square that weights count with at least: those that start at 0 (LoRA's B)
    would stay there. At lr 1e-3 a tau of 0.004 to 0.01 acts as a warm-up of some hundred steps; the paper's tau, its
    scope (matrix or model) and whether decay uses lr or alpha are unverified. `cautious` rescales after the bound.
    https://huggingface.co/papers/2505.21910
    """

    tau: float | None = hp(0.01, "largest relative change of the spectral norm in a step; none is AdamW", gt=0)
    floor: float = hp(1e-3, "smallest root mean square of the weights", ge=0)

    elementwise = False
    needs_matrix = True

    @staticmethod
    def init(p, h):
        slots = AdamW.init(p, h)
        if p.ndim > 1 and h.tau is not None:
            columns = Slot((p.numel() // max(p.shape[0], 1),), (None,))
            slots |= {"x_p": columns, "x_u": columns}
        return slots

    @staticmethod
    def update(g, p, s, h):
        u = AdamW.update(g, p, s, h)
        if p.ndim < 2 or h.tau is None:
            return u
        of_p, s.x_p = spectral_norm(p.flatten(1), s.x_p)
        of_u, s.x_u = spectral_norm(u.flatten(1), s.x_u)
        rows, columns = p.flatten(1).shape
        cap = h.tau * of_p.clamp(min=h.floor * (rows**0.5 + columns**0.5))  # sigma of noise of that size
        return u * (cap / (h.lr * of_u).clamp(min=1e-30)).clamp(max=1.0)

    @staticmethod
    def options_for(at, h):
        return {"tau": None} if at.is_output or isinstance(at.module, torch.nn.Embedding) else {}

    @staticmethod
    def refuses(h):
        if h.tau is None:
            return AdamW.refuses(h) | {"floor": "it needs `tau`"}
        return AdamW.refuses(h) | {"trust_ratio": "both rescale the step of a matrix"}


def spectral_norm(x, vector):
    """(largest singular value, right singular vector) of a matrix, by two power iterations from a vector.

    A zero vector (the first step) is replaced by a fixed one; a zero matrix leaves the vector as it is.
    """
    start = beside(torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).sin(), x)
    vector = vector.where(vector.square().sum() > 0, start)
    for _ in range(2):
        left = x @ vector
        left = left / left.square().sum().sqrt().clamp(min=1e-30)
        right = x.mT @ left
        size = right.square().sum().sqrt()
        vector = (right / size.clamp(min=1e-30)).where(size > 0, vector)
    return size, vector
