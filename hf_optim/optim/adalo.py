# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AdaLo: momentum whose step size is read from the training loss."""

import torch

from ..core import Optimizer, hp, like


class AdaLo(Optimizer):
    """Momentum SGD without a second moment; one number per optimizer, an average of the loss, sets the step size.

        z = 1 / (2 + L)                         adversarial, compliant: the squashed loss, in (0, 1/2]
        z = L / kappa                           loss
        e <- beta2 e + (1 - beta2) z            one scalar for the whole optimizer
        eta = max(e / kappa, eps)               adversarial: the step grows as the loss falls
        eta = max((1 - e) / kappa, eps)         compliant: the step falls with the loss, from 1/kappa to 1/(2 kappa)
        eta = max(e, eps)                       loss: the step is proportional to the average loss
        m <- beta1 m + (1 - beta1) g
        p <- p - eta weight_decay p - eta m

    `lr` plays no part, unless `follow_schedule` multiplies eta by lr / initial lr. L is the loss as back-propagated,
    averaged over micro-batches and ranks; a negative one counts as 0, a NaN or infinite one leaves e as it is.

    Information Sciences 690, 121607 (2025), https://doi.org/10.1016/j.ins.2024.121607. The text of the paper was not
    available: `adversarial` and `compliant` are those of the public code (its 1/2 (tanh(-log1p(L) / 2) + 1) is
    1 / (2 + L)), `loss` is the rule an early note of that code gives, unverified against the paper. e starts at 0
    without correction, so `adversarial` and `loss` warm up over about 1 / (1 - beta2) steps and `compliant` starts
    at its maximum. Deviations: e is kept once, not per tensor; a missing loss is an error (there it gives a step of
    eps); a negative loss cannot turn the weights into NaN.
    """

    beta1: float = hp(0.9, "decay of the average gradient", ge=0, lt=1)
    beta2: float = hp(0.999, "decay of the average loss", ge=0, lt=1)
    kappa: float = hp(3.0, "divisor that turns the average loss into a step size", gt=0)
    eps: float = hp(1e-8, "smallest step size", ge=0)
    mode: str = hp("adversarial", "how the step follows the loss", choices=("adversarial", "compliant", "loss"))
    follow_schedule: bool = hp(False, "multiply the step by the scheduler's lr / initial lr")

    elementwise = True
    needs_loss = True
    returns_lr = True
    shared = {"e": 0.0}

    @staticmethod
    def init(p, h):
        return {"m": like(p)}

    @staticmethod
    def prepare(s, h):
        loss = h.loss.clamp(min=0)
        z = loss / h.kappa if h.mode == "loss" else 1 / (2 + loss)
        s.e = torch.where(h.loss.isfinite(), s.e.lerp(z, 1 - h.beta2), s.e)
        eta = {"adversarial": s.e / h.kappa, "compliant": (1 - s.e) / h.kappa, "loss": s.e}[h.mode].clamp(min=h.eps)
        return {"eta": eta * h.schedule if h.follow_schedule else eta}

    @staticmethod
    def update(g, p, s, h):
        s.m = s.m.lerp(g, 1 - h.beta1)
        return s.m, h.eta

    @staticmethod
    def averages(h):
        return {"m": (h.beta1, 1 - h.beta1)}

    @staticmethod
    def hint(groups):
        if any(group["follow_schedule"] and "initial_lr" not in group for group in groups):
            return "`follow_schedule` follows no scheduler: none set `initial_lr` (reduce_lr_on_plateau does not)"

    @staticmethod
    def refuses(h):
        return {} if h.beta1 else {"cautious": "without beta1 the update always agrees with the gradient"}
