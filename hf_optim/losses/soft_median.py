# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A batch loss between median and mean: samples count less the farther their rank is from the middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import hp
from ..core.sharding import side_by_side, world_size
from ..trainer.compute_loss import Loss, divisor


def soft_median(losses: Tensor, tau: float = 0.1, support: float | None = None) -> Tensor:
    """Average losses with weights that fall with the distance of their rank from the middle.

        x <- sort(losses);  r_i = (i - 1/2) / n;  a_i = |r_i - 1/2|
        w_i = exp(-(a_i - min a) / tau), 0 where a_i > support / 2;  result = sum_i w_i x_i / sum_i w_i

    An L-estimator (our design; no paper). The weights depend on the ranks alone and carry no gradient, so that the
    result moves with a shift and a positive scale of the losses, rises with each of them, lies between the smallest
    and the largest, and its gradient sums to 1. One or two losses give their mean. With `support`, a share of
    `(1 - support) / 2` of bad samples on one side has no influence; without, a bad sample's weight is
    `exp(-0.5 / tau)` of a middle one's. Never waits for the device.

    Args:
        losses (`torch.Tensor`):
            One loss per sample, shape (n,); computed in at least fp32. Without samples the result is
            `losses.sum()`, a 0 with a graph. A NaN makes the result NaN, and so does an infinite loss of weight 0.
        tau (`float`, defaults to 0.1):
            Width of the kernel as a share of the batch: 0 is the median (the mean of the middle two), infinity the
            mean.
        support (`float`, *optional*):
            Share of the batch, in (0, 1], that has any weight. The middle samples always do.

    Returns:
        `torch.Tensor`: a scalar in the dtype of the computation.

    Raises:
        `ValueError`: if an argument is out of range or `losses` has another number of dimensions.
    """
    if losses.ndim != 1:
        raise ValueError(f"`losses` must have shape (n,), one loss per sample, got {tuple(losses.shape)}")
    if not tau >= 0:
        raise ValueError(f"`tau` must be a number from 0 (median) to infinity (mean), got {tau!r}")
    if support is not None and not 0 < support <= 1:
        raise ValueError(f"`support` must be None or in (0, 1], got {support!r}")
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    if losses.numel() == 0:
        return losses.sum()
    counts = torch.ones_like(losses, dtype=torch.long)
    return (rank_weights(losses, counts, tau, support) * losses).sum()


@torch.no_grad()
def rank_weights(losses: Tensor, counts: Tensor, tau: float, support: float | None) -> Tensor:
    """The weights of [`soft_median`], where a sample stands for `counts` equal ones: (n,), summing to 1.

    Its rank is the middle of its counts, as in a weighted median. A count of 0 has no weight and moves no rank.
    """
    order = losses.argsort(stable=True)
    mass = counts[order]
    total = mass.sum()
    # 2 n a_i in whole numbers: the two middle ranks of an even batch are then equally far, not nearly
    far = (2 * mass.cumsum(0) - mass - total).abs()
    beyond = far - far.masked_fill(mass == 0, torch.iinfo(far.dtype).max).min()
    distance = beyond.to(losses.dtype) / (2 * total.clamp(min=1))
    kernel = torch.exp(-distance / tau) if tau else (beyond == 0).to(losses.dtype)
    if support is not None:
        kernel = kernel.masked_fill((far > support * total) & (beyond > 0), 0.0)
    weights = kernel.masked_fill(mass == 0, 0.0) * mass
    return torch.empty_like(weights).scatter(0, order, weights / weights.sum().clamp(min=1))


def survey_soft_median(losses: Tensor, min_temperature: float = 0.1) -> Tensor:
    """The form in the survey that this project began with, to compare with; train with [`soft_median`].

        x <- sort(losses, and a 0 if n is even);  T = max(min_temperature, std(losses) / 2)
        result = sum_i softmax_i(-|i - centre| / T) x_i

    Its defects: the padded 0 takes weight and turns the median of 1, 2, 3, 4 into 2; T has the unit of a loss and the
    ranks have none, so a scaled batch gives another mixture; T carries a gradient, so the result can fall while a
    loss rises; shifted or negative losses put the 0 elsewhere; one sample has no standard deviation; ranks in a
    narrow dtype collide.

    Args:
        losses (`torch.Tensor`): one loss per sample, shape (n,).
        min_temperature (`float`, defaults to 0.1): lower bound of T.

    Returns:
        `torch.Tensor`: a scalar.
    """
    n = losses.shape[0]
    padded = losses if n % 2 else F.pad(losses, (0, 1))
    temperature = losses.new_tensor(min_temperature)
    if n > 1:
        temperature = torch.maximum(temperature, 0.5 * losses.std())
    ranks = torch.arange(len(padded), dtype=losses.dtype, device=losses.device)
    return torch.softmax(-(ranks - len(padded) // 2).abs() / temperature, 0) @ padded.sort().values


class SoftMedian(Loss):
    """The [`soft_median`] of the samples of a batch as a training loss, against a few bad samples.

    The loss of a sample is the mean over its labels (of a sequence, over its tokens; -100 does not count). The median
    is over the micro-batches of all ranks together (each rank learns the losses of the others, and back-propagates
    its own share; this waits for the device). Over the micro-batches of an accumulation window it is a mean of
    medians, each weighted by its number of labels. Samples with unequal token counts take part as in a weighted
    median: a sequence of t tokens is t samples of equal loss whose rank is their middle. So a large `tau` gives
    exactly Trainer's own loss, the mean over tokens; with unequal counts the result need not rise with every loss.

    Fewer than three samples in a micro-batch of all ranks are averaged, so it then has no effect; a batch packed into
    one row is one sample. It ignores both tails, also what is rare and right. Evaluation gets the plain mean.
    """

    name = "soft_median"
    tau: float = hp(0.1, "width of the kernel as a share of the batch; 0 is the median, 1e9 the mean", ge=0)
    support: float | None = hp(None, "share of the batch that has any weight; None is all of it", gt=0, le=1)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch, a scalar; the arguments are those of a `compute_loss_func`."""
        rows = self.rows(outputs, labels)
        losses, items = rows.losses(), divisor(num_items_in_batch, rows.counts)
        if not torch.is_grad_enabled():
            return losses.sum() / items
        counts = rows.counts.view(rows.samples, -1).sum(1)
        means = losses.view(rows.samples, -1).sum(1) / counts.clamp(min=1)
        (all_means, all_counts), own = side_by_side(means.detach(), counts)
        share = (rank_weights(all_means, all_counts, self.tau, self.support)[own] * means).sum()
        if num_items_in_batch is None:  # nobody scales: the mean over ranks of the gradients is that of the median
            return share * world_size()
        return share * all_counts.sum() / items
