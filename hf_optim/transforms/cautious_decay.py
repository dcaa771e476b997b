# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Cautious weight decay."""

from ..core import Flag, xorsign


class CautiousDecay(Flag):
    """Decay a weight only where the update moves it towards zero anyway.

        p <- p - lr weight_decay [u p >= 0] p

    by the signs of the rule's own direction u (before the cautious mask, which would turn the decay on exactly where
    the update is suppressed) and of the old weight. Where u = 0 the decay acts, as in the paper: rows that never get
    a gradient keep decaying. https://huggingface.co/papers/2510.12402
    """

    flag, value, stage = "decay", "cautious", "decay"

    @staticmethod
    def apply(p, c):
        mask = (xorsign(c.u, c.p) >= 0).to(p.dtype)
        return c.h.weight_decay * mask * p
