# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""nSGDA: normalised SGD with momentum."""

from ..core import Optimizer, hp, like


class NSGDA(Optimizer):
    """Step along the average gradient divided by its norm: only the direction counts.

        m <- momentum m + (1 - momentum) g
        d = ||m||                               of the tensor, or of all tensors with `scope=model`
        p <- p - lr weight_decay p - lr m / (d + eps (1 - momentum^t))

    The update of a tensor has norm `lr`, so the pure rule wants lr of 0.01 to 0.1; `scale=rms` multiplies by the root
    of the number of elements, so that an element moves by `lr` as in Adam. Descent and ascent (for a GAN) are two
    optimizers. A bias-corrected m gives the same rule, the correction remains in front of eps alone.

    https://huggingface.co/papers/2210.04319; whether its experiments use the norm of a layer or of the network, and
    with which momentum, is unverified, so both are offered. Deviation: weight decay is decoupled, since a decay added
    to a zero gradient becomes the whole direction and runs at full speed.
    """

    lr: float = hp(0.03, "norm of the update of a tensor", ge=0)
    momentum: float = hp(0.9, "decay of the average gradient", ge=0, lt=1)
    eps: float = hp(1e-8, "added to the norm", gt=0)
    scope: str = hp("tensor", "what the norm is taken over", choices=("tensor", "model"))
    scale: str = hp("norm", "whether lr is the norm of the update or its root mean square", choices=("norm", "rms"))

    needs_matrix = True  # the norm of a flat shard of several tensors is another rule

    @staticmethod
    def init(p, h):
        return {"m": like(p)}

    @staticmethod
    def scalars(t, h):
        return {"floor": h.eps * (1 - h.momentum**t)}

    @staticmethod
    def sums(h):
        return ("norm2", "count") if h.scope == "model" else ()

    @staticmethod
    def measure(g, p, s, h):
        m = s.m.lerp(g, 1 - h.momentum)
        return {"norm2": m.square().sum(), "count": m.numel()}

    @staticmethod
    def update(g, p, s, h):
        s.m = s.m.lerp(g, 1 - h.momentum)
        norm2, count = (h.norm2, h.count) if h.scope == "model" else (s.m.square().sum(), s.m.numel())
        size = count**0.5 if h.scale == "rms" else 1.0
        return size * s.m / (norm2**0.5 + h.floor)

    @staticmethod
    def averages(h):
        return {"m": (h.momentum, 1 - h.momentum)}

    @staticmethod
    def refuses(h):
        return {} if h.momentum else {"cautious": "without momentum the update always agrees with the gradient"}
