# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""LAMB's trust ratio."""

from ..core import Flag, hp, rms


class TrustRatio(Flag):
    """Scale the whole step of a matrix, decay included, to the norm of its weights.

        q = u + weight_decay p
        q <- q max(||p||, trust_floor sqrt(n)) / ||q||      1 where ||q|| = 0, or ||p|| = 0 without a floor

    so that every step moves a matrix by lr times its own norm. `trust_floor` (a root mean square) lets weights that
    start at zero move; 0 is the paper. Vectors (biases, norm weights) keep their step, as in the paper's experiments.
    `trust_on=gradient` is a survey's variant, the ratio of weights and gradient applied to the gradient: Adam divides
    it out again, so under Adam it does not control the step. https://huggingface.co/papers/1904.00962
    """

    flag, stage, elementwise = "trust_ratio", "step", False
    trust_floor: float = hp(1e-3, "smallest root mean square of the weights in the ratio", ge=0)
    trust_clip: float | None = hp(None, "largest ratio", gt=0)
    trust_vectors: bool = hp(False, "scale vectors and scalars too")
    trust_on: str = hp("update", "what is scaled; the paper's is the update", choices=("update", "gradient"))

    @classmethod
    def acts_at(cls, h):
        return "gradient" if h.trust_on == "gradient" else cls.stage

    @staticmethod
    def apply(x, c):
        if x.ndim < 2 and not c.h.trust_vectors:
            return x
        weight, size = rms(c.p).clamp(min=c.h.trust_floor), rms(x)
        ratio = (weight / size.where(size > 0, 1.0)).where((weight > 0) & (size > 0), 1.0)
        return x * (ratio if c.h.trust_clip is None else ratio.clamp(max=c.h.trust_clip))
