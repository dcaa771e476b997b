# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Lookahead."""

from ..core import Flag, hp, like


class Lookahead(Flag):
    """Every k steps pull the weights back to a slow copy that follows them.

        every k-th step:  slow <- slow + alpha (p - slow);  p <- slow

    The slow copy starts as the weights before the first step, so the first k steps are pulled back too. Steps are
    counted per parameter: one without a gradient does not move. Moments are left alone (no pull-back of momentum).
    Between syncs `p` holds the fast weights, and those are what is saved. https://huggingface.co/papers/1907.08610
    """

    flag, stage = "lookahead", "parameter"
    lookahead_k: int = hp(5, "steps between two syncs", ge=1)
    lookahead_alpha: float = hp(0.5, "share of the way that the slow weights go", gt=0, le=1)

    @staticmethod
    def init(p, h):
        return {"lookahead_slow": like(p, fill="param", narrow=False)}

    @staticmethod
    def scalars(t, h):
        sync = float(t % h.lookahead_k == 0)
        return {"lookahead_pull": sync * h.lookahead_alpha, "lookahead_sync": sync}

    @staticmethod
    def apply(p, c):
        c.s.lookahead_slow = c.s.lookahead_slow.lerp(p, c.h.lookahead_pull)
        return p.lerp(c.s.lookahead_slow, c.h.lookahead_sync)
