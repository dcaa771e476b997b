# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Weights for rare samples, read from how the gradient of a sample agrees with the average gradient."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import hp
from ..core.sharding import sum_over_ranks
from ..trainer.compute_loss import Loss, Rows, divisor, unwrapped


logger = logging.getLogger(__name__)

FILE = "gradtail.pt"


class GradTail(Loss):
    """Weigh samples up whose gradient is neither along nor against the average gradient: GradTail-style weights.

        G_i = d_i h_i^T    gradient of the output layer: d_i by its output, h_i its input (and a 1 if it has a bias)
        c_i = <G_i, A> / (|G_i| |A| + eps)
        s_i = c_i / std(c)
        w_i = clip(1 + alpha exp(-s_i^2 / 2), min_weight, max_weight) / mean(w)
        loss = sum_i w_i l_i / num_items_in_batch
        A <- decay A + (1 - decay) mean_i G_i    after the optimizer step; std(c) and mean(w) are running ones too

    The paper (https://huggingface.co/papers/2201.05938) weighs samples while training by the agreement of their
    gradient with an average gradient, in favour of the long tail. That is all we could check: its weight function,
    normalisation, choice of layer and constants are not known to us, and everything above and every default is our
    design. `kernel="low_alignment"` replaces exp(-s^2 / 2) by sigmoid(-s), which also favours the opposed.

    A sample is a row of logits: a text of a classifier, a token of a language model (per sequence the norm of a
    gradient costs the square of its length). A, std and mean come from earlier optimizer steps only, over the samples
    of all ranks and micro-batches alike, so the weights do not depend on how a step is cut. Until `warmup` steps, and
    in evaluation, the weights are 1. Everything but `l_i` is in fp32 and carries no gradient.

    Costs another pass through the output layer, two more copies of the logits, and two fp32 copies of the layer's
    weight (4 bytes times classes times features each; a vocabulary of 128 k by 4096 features takes 4.2 GB in all, and
    half as much again for a moment). `gradient="bias"` takes h_i = 1: two vectors of the size of the vocabulary, and
    nothing is read from the output layer.

    Beware: wrong labels stand out just as rare samples do; samples that are nearly right have no direction and count
    as orthogonal. The state is saved as `gradtail.pt` in every checkpoint and read again when a run resumes. Outside
    of Trainer, call [`~GradTail.step`] after every `optimizer.step()` and leave `num_items_in_batch` None.
    """

    name = "gradtail"
    alpha: float = hp(1.0, "how much more a sample at the peak of the kernel weighs; 0 is no reweighting", ge=0)
    kernel: str = hp("orthogonal", "which samples weigh more", choices=("orthogonal", "low_alignment"))
    gradient: str = hp("head", "of the output layer's weight, or of its bias alone (cheap)", choices=("head", "bias"))
    decay: float = hp(0.99, "of the running averages, per optimizer step", ge=0, lt=1)
    min_weight: float = hp(0.5, "smallest weight, before it is normalised", gt=0, le=1)
    max_weight: float = hp(3.0, "largest weight, before it is normalised", ge=1)
    warmup: int = hp(100, "optimizer steps before the weights act", ge=3)
    eps: float = hp(1e-8, "added to the norms in the cosine", gt=0)

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._hook: Any = None
        self._attached = False
        self.attach(model)
        self.reset()

    def reset(self) -> None:
        """Forget every average; the warm-up starts again."""
        self.steps = 0
        self.averages: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._seen: tuple[Tensor, Tensor] | None = None
        self._checked = False

    def attach(self, model: torch.nn.Module) -> None:
        """Read the features of this model's output layer from now on.

        Raises:
            `ValueError`: if no output layer is found.
        """
        if self._hook is not None:
            self._hook.remove()
        if self.gradient == "head":
            self._head = output_layer(unwrapped(model))
            self._hook = self._head.register_forward_hook(self._capture)

    def _capture(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._seen = (inputs[0].detach(), output.detach())

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch, a scalar; the arguments are those of a `compute_loss_func`.

        Raises:
            `RuntimeError`: if Trainer does not know this object as a callback, or the output layer did not run.
            `ValueError`: if logits or labels are missing, or the logits are not what the output layer returned.
        """
        rows = self.rows(outputs, labels)
        losses, items = rows.losses(), divisor(num_items_in_batch, rows.counts)
        if torch.is_grad_enabled():
            if num_items_in_batch is not None and not self._attached:
                raise RuntimeError(
                    "GradTail must also be a callback of the trainer, to learn when a step ends: "
                    "`Trainer(..., compute_loss_func=loss, callbacks=[loss])`"
                )
            losses = self.weights(rows) * losses
        return losses.sum() / items

    @torch.no_grad()
    def weights(self, rows: Rows) -> Tensor:
        """The weight of every row, (n,); what is needed for the averages of the next step is put aside."""
        with torch.autocast(rows.logits.device.type, enabled=False):
            delta, h = gradient_of_logits(rows), self._features(rows)
            return self._weights(delta, h, (rows.counts > 0).to(delta.dtype))

    def _weights(self, delta: Tensor, h: Tensor, valid: Tensor) -> Tensor:
        cosine, weights = torch.zeros_like(valid), torch.ones_like(valid)
        if self.steps >= 1:
            # the average started at 0; that much smaller, `eps` has the same effect and no copy is made
            eps = self.eps * (1 - self.decay**self.steps)
            cosine = alignment(delta, h, self.averages["gradient"], eps)
        if self.steps >= 2:
            first, second, mass = self.averages["cosine"]
            std = (second / mass - (first / mass).square()).clamp(min=0).sqrt()
            s = cosine / (std + self.eps)
            kernel = torch.exp(-s.square() / 2) if self.kernel == "orthogonal" else torch.sigmoid(-s)
            weights = (1 + self.alpha * kernel).clamp(self.min_weight, self.max_weight)
        totals = [(x * valid).sum() for x in (cosine, cosine.square(), weights)]
        self._add("gradient", delta.T @ h)
        self._add("totals", torch.stack([*totals, valid.sum()]))
        if self.steps < self.warmup:
            return torch.ones_like(valid)
        mean, mass = self.averages["weight"]
        return weights / (mean / mass)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name].add_(value) if name in self._sums else value

    def _features(self, rows: Rows) -> Tensor:
        """What the output layer multiplied, (n, d), and a 1 for its bias, in the dtype of the logits."""
        one = rows.logits.new_ones(len(rows.logits), 1)
        if self.gradient == "bias":
            return one
        if self._seen is None:
            raise RuntimeError(
                "GradTail saw no forward pass of the output layer: this model computes its logits elsewhere (a fused "
                "kernel such as Liger's?) or is not the model that the loss was made for. Switch the kernel off, or "
                "use `gradient=bias`"
            )
        (h, output), self._seen = self._seen, None
        if not self._checked:
            self._check(output, rows.logits)
        h = h.reshape(len(rows.logits), -1).to(rows.logits.dtype)
        return h if self._head.bias is None else torch.cat([h, one], 1)

    def _check(self, output: Tensor, logits: Tensor) -> None:
        """Once: it waits for the device."""
        same = output.numel() == logits.numel()
        if not same or not torch.allclose(output.reshape(logits.shape).to(logits.dtype), logits, equal_nan=True):
            raise ValueError(
                f"the logits ({logits.shape[0]} rows of {logits.shape[1]}) are not what the output layer returned "
                f"({tuple(output.shape)}): the model changes them (soft-capping, a scale) or picks some of the rows. "
                "Use `gradient=bias`"
            )
        self._checked = True

    @torch.no_grad()
    def step(self) -> None:
        """End an optimizer step: take its samples, on all ranks, into the averages. Trainer calls it by itself.

        A step whose gradients are not finite is left out.
        """
        if not self._sums:
            return
        gradient, totals = sum_over_ranks(self._sums["gradient"]), sum_over_ranks(self._sums["totals"])
        self._sums = {}
        if not bool(gradient.isfinite().all() & totals.isfinite().all()):
            return
        count = totals[3].clamp(min=1)
        cosine, square, weight, _ = totals / count
        one = torch.ones_like(count)
        self._move("gradient", gradient.div_(count))
        if self.steps >= 1:
            self._move("cosine", torch.stack([cosine, square, one]))
        if self.steps >= 2:
            self._move("weight", torch.stack([weight, one]))
        self.steps += 1

    def _move(self, name: str, value: Tensor) -> None:
        """The averages start at 0; the 1 averaged along with them says by how much they are too small."""
        average = self.averages.get(name)
        self.averages[name] = torch.zeros_like(value) if average is None else average
        self.averages[name].lerp_(value, 1 - self.decay)

    # ---- Trainer ----

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control)
        self._attached = True
        self.attach(model)
        self.reset()
        if state.global_step:
            self._resume(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            name = f"checkpoint-{state.global_step}"
            # a trial of a hyperparameter search has a folder of its own; the newest is the one just written
            folders = [
                f for f in (Path(args.output_dir, name), *Path(args.output_dir).glob(f"*/{name}")) if f.is_dir()
            ]
            newest = max(folders, key=lambda folder: (folder / "trainer_state.json").stat().st_mtime_ns)
            torch.save({"steps": self.steps, **self.averages}, newest / FILE)

    def _resume(self, args: Any, state: Any) -> None:
        candidates = [Path(args.output_dir, f"checkpoint-{state.global_step}")]
        if isinstance(args.resume_from_checkpoint, str):
            candidates.insert(0, Path(args.resume_from_checkpoint))
        for folder in candidates:
            if (folder / FILE).is_file() and _wrote(folder, state):
                saved = torch.load(folder / FILE, map_location=args.device, weights_only=True)
                self.steps, self.averages = saved.pop("steps"), saved
                return
        logger.warning(
            "GradTail found no `%s` of this run in %s and starts with a new warm-up. If another checkpoint is "
            "resumed, name it in `TrainingArguments(resume_from_checkpoint=...)` too",
            FILE,
            " or ".join(f"`{folder}`" for folder in candidates),
        )


def _wrote(folder: Path, state: Any) -> bool:
    """Whether this checkpoint is the one that the trainer resumes, and not that of another run in its place."""
    file = folder / "trainer_state.json"
    if not file.is_file():
        return False
    saved = type(state).load_from_json(str(file))
    return saved.global_step == state.global_step and saved.log_history == state.log_history


def output_layer(model: Any) -> torch.nn.Module:
    """The layer that makes the logits: the output embeddings, or the last linear layer with `num_labels` outputs.

    Raises:
        `ValueError`: if there is none.
    """
    head = model.get_output_embeddings()
    if head is not None:
        return head
    size = model.config.num_labels
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == size]
    if not layers:
        raise ValueError(
            f"GradTail found no output layer in {type(model).__name__}: it has no output embeddings and no linear "
            f"layer with `num_labels` ({size}) outputs. Use `gradient=bias`"
        )
    return layers[-1]


@torch.no_grad()
def gradient_of_logits(rows: Rows) -> Tensor:
    """The derivative of every row's loss by its own logits, (n, C); 0 for rows without a label."""
    with torch.enable_grad():
        logits = rows.logits.detach().requires_grad_()
        (delta,) = torch.autograd.grad(rows.losses(logits).sum(), logits)
    return delta


def alignment(delta: Tensor, h: Tensor, average: Tensor, eps: float) -> Tensor:
    """The cosine of every rank-one gradient `delta_i h_i^T` with `average`, (n,), without forming any of them."""
    dot = (delta * (h @ average.T)).sum(1)
    return dot / (delta.norm(dim=1) * h.norm(dim=1) * average.norm() + eps)
