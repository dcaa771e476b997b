# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the losses share: their options, and the loss of every row of logits as transformers computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from ..core.options import Option, collect, parse_options


IGNORE = -100


class Rows(NamedTuple):
    """A batch with one row per prediction: a token of a language model, a text of a classifier.

    `logits` is (n, C) in at least fp32; `labels` is (n,) classes, or (n, C) targets; `counts` (n,) says how many
    labels a row has, as Trainer counts them (0 where the label is -100); `samples` is the number of sequences.
    """

    logits: Tensor
    labels: Tensor
    counts: Tensor
    samples: int
    problem: str

    def losses(self, logits: Tensor | None = None) -> Tensor:
        """The loss of every row, summed over its labels: (n,)."""
        z = self.logits if logits is None else logits
        if self.problem == "single_label_classification":
            return F.cross_entropy(z, self.labels, ignore_index=IGNORE, reduction="none")
        if self.problem == "regression":
            return (z - self.labels).square().sum(1)
        return F.binary_cross_entropy_with_logits(z, self.labels, reduction="none").sum(1)


class Loss(TrainerCallback):
    """Base of the losses: `Trainer(..., compute_loss_func=loss, callbacks=[loss])`.

    The result is a sum over the labels of the micro-batch over `num_items_in_batch`, the number of labels of the whole
    step: what Trainer expects of a `compute_loss_func`, whatever the accumulation and the number of ranks. (Models
    such as BERT return a plain mean instead, which Trainer takes for such a sum: without a `compute_loss_func`, their
    gradients grow with the accumulation steps and with the ranks.) Evaluation (gradients disabled) gets the plain
    mean.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to train, with or without PEFT. It says whether labels are shifted (a causal LM) and, by
            `config.problem_type` or `config.num_labels`, which loss a sequence classification has.
        options: of the class.

    Raises:
        `TypeError`: for an unknown option.
        `ValueError`: for a value out of range.
    """

    name: ClassVar[str]

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        kinds = self.options()
        vars(self).update({name: kind.default for name, kind in kinds.items()})
        vars(self).update(parse_options(self.name, options, kinds))
        model = unwrapped(model)
        self.config: Any = model.config
        shifts = getattr(model, "loss_function", None) is ForCausalLMLoss
        self.shift = shifts and not getattr(self.config, "is_encoder_decoder", False)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Every option with its type, default, range and documentation."""
        return collect(cls)

    def rows(self, outputs: Any, labels: Tensor | None) -> Rows:
        """Bring the arguments of a `compute_loss_func` into the form of [`Rows`].

        Raises:
            `ValueError`: if there are no logits or no labels.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if logits is None:
            raise ValueError(
                f"{self.name} needs `outputs.logits`, which this model does not return. Switch off what fuses the "
                "output layer with the loss (`use_liger_kernel`), and leave `return_dict` on"
            )
        if labels is None:
            raise ValueError(f"{self.name} needs `labels` in every batch, got None; check the data collator")
        labels, samples = labels.to(logits.device), len(labels)
        problem = self._problem(logits, labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if problem == "single_label_classification":
            if logits.ndim == 3 and self.shift:
                labels = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
            labels, logits = labels.reshape(-1), logits.reshape(-1, logits.shape[-1])
            return Rows(logits, labels, labels.ne(IGNORE).long(), samples, problem)
        logits = logits.reshape(samples, -1)
        labels = labels.reshape(logits.shape).to(logits.dtype)
        counts = torch.full((samples,), logits.shape[1], device=logits.device)
        return Rows(logits, labels, counts, samples, problem)

    def _problem(self, logits: Tensor, labels: Tensor) -> str:
        """As `ForSequenceClassificationLoss` decides it."""
        if logits.ndim == 3:
            return "single_label_classification"
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        whole = not labels.is_floating_point()
        return "single_label_classification" if whole else "multi_label_classification"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.label_smoothing_factor:
            raise ValueError(
                f"Trainer ignores `label_smoothing_factor` ({args.label_smoothing_factor}) next to the loss "
                f"{self.name!r}; set it to 0"
            )


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def divisor(num_items: Tensor | int | None, counts: Tensor) -> Tensor | int:
    """What the summed loss is divided by: the number of labels of the step, or, where it is unknown, of the batch.

    Raises:
        `ValueError`: under `torch.nn.DataParallel`, where Trainer counts per device.
    """
    if num_items is None:
        return counts.sum()
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"`num_items_in_batch` has shape {tuple(num_items.shape)}, one count per device of a DataParallel "
                "model; start one process per device instead: `torchrun --nproc_per_node N`"
            )
        return num_items.to(counts.device).reshape(())
    return num_items
