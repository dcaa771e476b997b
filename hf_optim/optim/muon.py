# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum with all its singular values set to one."""

import torch

from ..core import Optimizer, back, hp, like, lower, unsharded
from .adamw import AdamW


class Muon(AdamW):
    """Orthogonalised momentum for hidden matrices, AdamW for everything else.

        B <- momentum B + (1 - momentum) g
        G = momentum B + (1 - momentum) g                      nesterov; else B
        p <- p - lr weight_decay p - lr s orthogonalize(G)     all singular values near 1

    s is 0.2 sqrt(max(rows, columns)) with `match_rms`, for which AdamW's lr serves both; with `original` sqrt(max(1,
    rows / columns)), lr near 0.02, `adamw_lr` for the rest. Built from a model, embeddings, output layer, tables,
    LoRA's factors and what `optim_target_modules` misses go to AdamW as vectors do. Experts are matrices one by one,
    convolutions (out, rest). https://huggingface.co/papers/2502.16982, https://kellerjordan.github.io/posts/muon
    """

    beta2: float = hp(0.95, "decay of the average squared gradient (AdamW)", ge=0, lt=1)
    momentum: float = hp(0.95, "decay of the average gradient (Muon)", ge=0, lt=1)
    nesterov: bool = hp(True, "look one step of momentum ahead")
    scale: str = hp("match_rms", "size of an update", choices=("match_rms", "original"))
    steps: int = hp(5, "Newton-Schulz iterations", ge=1)
    iterate_in: str = hp("auto", "their precision; auto: bf16 on a GPU", choices=("auto", "float32", "bfloat16"))
    rule: str = hp("auto", "auto: muon for matrices, adamw for vectors", choices=("auto", "muon", "adamw"))
    adamw_lr: float | None = hp(None, "step size of what goes to AdamW; none: lr", ge=0)

    elementwise, needs_matrix, uses_targets = False, True, True
    by_name, second_moment = ("adamw_lr",), Optimizer.second_moment

    @staticmethod
    def init(p, h):
        return {"b": like(p)} if is_muon(p, h) else AdamW.init(p, h)

    @staticmethod
    def update(g, p, s, h):
        if not is_muon(p, h):
            return AdamW.update(g, p, s, h)
        s.b = s.b.lerp(g, 1 - h.momentum)
        x = (g.lerp(s.b, h.momentum) if h.nesterov else s.b).flatten(1 if p.ndim > 3 else -1)
        m, n = x.shape[-2:]
        size = 0.2 * max(m, n) ** 0.5 if h.scale == "match_rms" else max(1, m / n) ** 0.5
        return size * orthogonalize(unsharded(x), h).reshape(g.shape)

    @staticmethod
    def options_for(at, h):
        leaf, other = at.name.rpartition(".")[2], isinstance(at.module, (torch.nn.Embedding, torch.nn.Conv1d))
        other |= "lora_" in at.name or any(word in leaf for word in ("bias", "embed", "token", "A_log", "original0"))
        if at.p.ndim < 2 or at.is_output or other or at.is_target is False:
            return {"rule": "adamw"} | ({} if h.adamw_lr is None else {"lr": h.adamw_lr})
        return {"rule": "muon"}

    @staticmethod
    def refuses(h):
        return {"adamw_lr": "it needs the modules of the parameters: build the optimizer from the model"}

    @staticmethod
    def hint(groups):
        if any(p.ndim > 1 for group in groups if group["rule"] == "auto" for p in group["params"]):
            return "built from parameters, it orthogonalises embeddings and heads too: pass the model"


def is_muon(p, h):
    return p.ndim > 1 and h.rule != "adamw"


def orthogonalize(x, h):
    """Newton-Schulz iterations of a matrix or a stack of them; singular values below 0.001 stay small."""
    norm, tall = x.square().sum((-2, -1), keepdim=True).sqrt(), x.shape[-2] > x.shape[-1]
    y = lower((x.mT if tall else x) / norm.where(norm > 0, 1.0), h.iterate_in)
    fma = torch.baddbmm if y.ndim == 3 else torch.addmm  # one rounding, which bf16 feels
    for _ in range(h.steps):
        a = y @ y.mT
        y = fma(y, fma(a, a, a, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return back(y.mT if tall else y, x)
