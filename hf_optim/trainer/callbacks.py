# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Histograms and tail figures of parameters, gradients and updates, for the reporters of any Trainer."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback, ProgressCallback

from ..core import sharding
from .tails import LEVELS, WIDTH, Tail, group_names, read, tally


logger = logging.getLogger(__name__)

KINDS = ("parameter", "gradient", "update")
SAMPLE = 65_536  # entries of a group whose update is looked at


# ---- which rank counts what ----------------------------------------------------------------------------------------
class Part(NamedTuple):
    """What this rank holds of a parameter, and whether it is the one to count it. Entries `first::stride` are the
    sample for its update."""

    parameter: torch.nn.Parameter
    group: int
    here: bool
    first: int
    stride: int

    def sample(self) -> Tensor:
        """A copy of the sampled entries; empty where another rank counts."""
        entries = sharding.local(self.parameter.detach()).reshape(-1)[self.first :: self.stride]
        return entries.clone() if self.here else entries[:0]


def _position(p: Tensor) -> tuple[int, ...] | None:
    """Which shard of a parameter this rank holds; None for a rank outside its mesh. Equal on replicas."""
    if not isinstance(p, DTensor):
        return ()
    coordinate = p.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    return tuple(c for c, place in zip(coordinate, p.placements) if not place.is_replicate())


def _counted_here(parameters: list[torch.nn.Parameter]) -> list[bool]:
    """Of ranks that hold the same shard, or the same whole parameter, one counts it; they take turns."""
    positions = [_position(p) for p in parameters]
    if not sharding.several_ranks():
        return [True] * len(parameters)
    everyone = sharding.of_all_ranks(positions)
    here = []
    for i, position in enumerate(positions):
        holders = [rank for rank, theirs in enumerate(everyone) if theirs[i] == position]
        here.append(position is not None and holders[i % len(holders)] == sharding.rank())
    return here


def _offset(p: Tensor) -> int:
    try:
        return sharding.flat_offset(p)
    except NotImplementedError:  # sharded along another axis: the sample is evenly spaced in the shard instead
        return 0


def divide(parameters: list[torch.nn.Parameter], groups: list[int]) -> list[Part]:
    """Which rank counts and samples what; a collective call. `groups[i]` is the group of `parameters[i]`."""
    sizes = [0] * (max(groups, default=0) + 1)
    for p, group in zip(parameters, groups):
        sizes[group] += p.numel()
    parts = []
    for p, group, here in zip(parameters, groups, _counted_here(parameters)):
        stride = max(1, math.ceil(sizes[group] / SAMPLE))
        parts.append(Part(p, group, here, -_offset(p) % stride, stride))
    return parts


# ---- reporters -----------------------------------------------------------------------------------------------------
def introducing(add_callback: Callable[..., Any]) -> Callable[..., Any]:
    """`CallbackHandler.add_callback` that tells a [`GradientTails`] which handler it is in.

    Trainer calls the reporters before the callbacks of the user and gives neither the others, so nothing that these
    could do in an event reaches a reporter.
    """
    if getattr(add_callback, "_introduces", False):
        return add_callback

    @functools.wraps(add_callback)
    def wrapper(self: CallbackHandler, callback: Any) -> None:
        add_callback(self, callback)
        if isinstance(self.callbacks[-1], GradientTails):
            self.callbacks[-1].handler = self

    wrapper._introduces = True  # type: ignore[attr-defined]
    return wrapper


CallbackHandler.add_callback = introducing(CallbackHandler.add_callback)  # type: ignore[method-assign]

NOT_REPORTERS = (DefaultFlowCallback, ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)


def reporters(handler: CallbackHandler | None) -> list[TrainerCallback]:
    """The callbacks that take logs anywhere but to the screen."""
    return [
        callback
        for callback in (handler.callbacks if handler is not None else [])
        if type(callback).on_log is not TrainerCallback.on_log and not isinstance(callback, NOT_REPORTERS)
    ]


def _warn_of_missing(found: list[TrainerCallback]) -> None:
    how = '`--report_to tensorboard` (`pip install "hf-optim[tensorboard]"`) or `--report_to wandb`'
    if not found:
        logger.warning("GradientTails records nothing: this Trainer has no reporter. Pass %s", how)
    elif not any(isinstance(r, (TensorBoardCallback, WandbCallback)) for r in found):
        names = ", ".join(type(r).__name__ for r in found)
        logger.warning("GradientTails: %s gets no histograms, only scalars. For histograms pass %s", names, how)


def _to_tensorboard(writer: Any, tails: dict[str, Tail], scalars: dict[str, float], step: int) -> None:
    for tag, tail in tails.items():
        low, high, n = tail.edges[0], tail.edges[-1], tail.counts.sum()
        limits, counts = tail.edges[1:].tolist(), tail.counts.tolist()
        writer.add_histogram_raw(tag, low, high, n, tail.sum, tail.squares, limits, counts, step)
    for tag, value in scalars.items():  # by on_log they would get in between the loss and the learning rate
        writer.add_scalar(tag, value, step)
    writer.flush()


def _to_wandb(wandb: Any, tails: dict[str, Tail], step: int) -> None:
    histograms = {}
    for tag, tail in tails.items():
        counts, edges = tail.counts, tail.edges
        while len(counts) > 512:  # the most that wandb takes
            counts = np.add.reduceat(counts, np.arange(0, len(counts), 2))
            edges = np.append(edges[:-1:2], edges[-1])
        histograms[tag] = wandb.Histogram(np_histogram=(counts, edges))
    wandb.log({**histograms, "train/global_step": step})


# ---- the callback --------------------------------------------------------------------------------------------------
class GradientTails(TrainerCallback):
    """Report the distributions of parameters, gradients and updates in each group of layers, and their tails.

    `Trainer(..., callbacks=[GradientTails(every=50)])`, or `trainer.add_callback(GradientTails())`. In every recorded
    step and for each group, with `<kind>` one of `parameter`, `gradient` and `update`:

    - `tails/<kind>/<group>`: the histogram, with bins as in [`Tail`]; to TensorBoard and wandb.
    - `tails/<kind>_kurtosis/<group>`: E x^4 / (E x^2)^2; to every reporter, as are the following. Reporters other
      than TensorBoard put them below `train/`, as they do with the loss.
    - `tails/<kind>_top1_share/<group>`: the share of the squared norm in the largest 1 % of the entries, see [`Tail`].
    - `tails/<kind>_nonfinite/<group>`: the number of infinities and NaN, where there are any.

    Gradients are those that the optimizer gets: accumulated, unscaled and clipped. They and the parameters, as of
    before the step, are counted to the last entry (of trainable parameters only), in pieces of about a million: there
    is no copy of them. Updates, after minus before, are those of at most 65,536 evenly spaced entries of a group,
    plus one for each of its parameters, which are kept from the beginning of the step. Shards are counted where they
    are, and replicas once. A recorded step makes one all-reduce and waits for the device once; others cost nothing.

    Where gradients are released during backward (`optimizer.release_gradients()`), they are gone before the step:
    updates, and the parameters they led to, are recorded without them.

    Args:
        every (`int`, *optional*, defaults to 50): record the steps whose number is a multiple of this.
        group_by (`str` or `Callable`, *optional*, defaults to `"auto"`):
            `"block"` (`model.layers.0.self_attn`), `"layer"` (`model.layers.0`), `"role"`
            (`model.layers.self_attn`), a function from the name of a parameter to that of its group, or `"auto"`:
            the first of these three that makes at most `max_groups`. See [`group_of`].
        max_groups (`int`, *optional*, defaults to 64): the most groups to report.

    Raises:
        `ValueError`: for a value that is not allowed; when training begins, for too many groups, DeepSpeed or FSDP1.
    """

    handler: CallbackHandler | None = None

    def __init__(self, every: int = 50, group_by: str | Callable[[str], str] = "auto", max_groups: int = 64) -> None:
        for name, value in (("every", every), ("max_groups", max_groups)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GradientTails: `{name}` must be an int of at least 1, got {value!r}")
        if not callable(group_by) and group_by not in ("auto", *LEVELS):
            choices = ", ".join(repr(level) for level in ("auto", *LEVELS))
            raise ValueError(f"GradientTails: `group_by` must be one of {choices} or a function, got {group_by!r}")
        self.every, self.group_by, self.max_groups = every, group_by, max_groups
        self._forget()

    def _forget(self) -> None:
        self._groups: list[str] = []
        self._parts: list[Part] = []
        self._reporters: list[TrainerCallback] = []
        self._active = False  # on all ranks alike
        self._before: list[Tensor] | None = None  # samples of the step that is being recorded
        self._table: Tensor | None = None  # (kinds, groups, WIDTH) fp64
        self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._forget()
        _refuse(args, model)
        self._reporters = reporters(self.handler)
        if state.is_world_process_zero:
            _warn_of_missing(self._reporters)
        anyone = torch.tensor(float(bool(self._reporters)), device=args.device)
        self._active = bool(sharding.mean_over_ranks(anyone) > 0)  # some add their reporter on one rank only
        if not self._active:
            return
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation, the outermost holds whole parameters that are not trained
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        of_each = group_names([name for name, _ in named], self.group_by, self.max_groups)
        self._groups = list(dict.fromkeys(of_each))
        self._parts = divide([p for _, p in named], [self._groups.index(group) for group in of_each])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = self._table = None
        if self._active and (state.global_step + 1) % self.every == 0:
            self._before = [part.sample() for part in self._parts]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._before is None:
            return
        self._table = torch.zeros(len(KINDS), len(self._groups), WIDTH, dtype=torch.float64, device=args.device)
        for part in self._parts:
            p = part.parameter
            self._add("parameter", part, p.detach())
            if p.grad is not None:
                self._add("gradient", part, sharding.match(p.grad, p))  # on all ranks: it may communicate
        if not self._warned and all(part.parameter.grad is None for part in self._parts):
            self._warned = True
            logger.warning(
                "GradientTails: no parameter has a gradient before step %d (they were released, or the step is "
                "skipped): parameters and updates are recorded without",
                state.global_step + 1,
            )

    def _add(self, kind: str, part: Part, x: Tensor) -> None:
        if part.here and self._table is not None:
            self._table[KINDS.index(kind), part.group] += tally(sharding.local(x)).to(self._table.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is None:
            return
        for part, before in zip(self._parts, self._before):
            self._add("update", part, part.sample().double() - before.double())
        self._before = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        table, self._table = self._table, None
        if table is None:
            return
        sharding.sum_over_ranks(table)
        if not state.is_world_process_zero:
            return
        rows = table.cpu().numpy()  # the one time this step waits for the device
        tails, scalars = self._figures(rows)
        for reporter in self._reporters:
            if isinstance(reporter, TensorBoardCallback):
                if reporter.tb_writer is not None:
                    _to_tensorboard(reporter.tb_writer, tails, scalars, state.global_step)
                continue
            reporter.on_log(args, state, control, logs=dict(scalars), **kwargs)
            if isinstance(reporter, WandbCallback):
                _to_wandb(reporter._wandb, tails, state.global_step)

    def _figures(self, rows: np.ndarray) -> tuple[dict[str, Tail], dict[str, float]]:
        tails, scalars = {}, {}
        for kind, of_groups in zip(KINDS, rows):
            for group, row in zip(self._groups, of_groups):
                tail = read(row)
                if tail.counts.any():
                    tails[f"tails/{kind}/{group}"] = tail
                if tail.kurtosis is not None and tail.top_share is not None:
                    scalars[f"tails/{kind}_kurtosis/{group}"] = tail.kurtosis
                    scalars[f"tails/{kind}_top1_share/{group}"] = tail.top_share
                if tail.nonfinite:
                    scalars[f"tails/{kind}_nonfinite/{group}"] = tail.nonfinite
        return tails, scalars

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget()


def _refuse(args: Any, model: torch.nn.Module) -> None:
    if args.deepspeed:
        raise ValueError(
            "GradientTails: DeepSpeed keeps gradients in buffers of its own and steps inside backward, so there is "
            "nothing to look at; use DDP or FSDP2, or train without this callback"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "GradientTails: FSDP1 cuts parameters without saying where; set `fsdp_version: 2`, or train without this "
            "callback"
        )
