# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Start any unmodified Hugging Face training script with every optimizer registered and the loss delivered.

    hf-optim run SCRIPT [ARGS...]
    accelerate launch [--config_file FILE] -m hf_optim.run SCRIPT [ARGS...]
    ... run -m MODULE [ARGS...]

`HF_OPTIM_REPLACE=adafactor` makes the built-in name resolve to the corrected optimizer.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from typing import Any


def prepare() -> None:
    """Register the names, deliver the loss from every accelerator and release gradients in its backward, log the step
    size of every Trainer and let it resume from complete checkpoints only; idempotent."""
    from accelerate import Accelerator
    from transformers import Trainer

    import hf_optim

    from .trainer.loss import LossAwareMixin, add_effective_lr, delivering, divide_once, forget_window
    from .trainer.release import unclipped
    from .trainer.resume import complete_checkpoint, withdraw_checkpoint

    names = os.environ.get("HF_OPTIM_REPLACE", "")
    hf_optim.register(replace=tuple(name for name in names.replace(" ", "").split(",") if name))
    if getattr(Accelerator.backward, "_delivers_loss", False):
        return
    Accelerator.backward = delivering(Accelerator.backward)
    Accelerator.clip_grad_norm_ = unclipped(Accelerator.clip_grad_norm_)
    create, report = Trainer.create_accelerator_and_postprocess, Trainer.log
    start, save, loop = Trainer.train, Trainer._save_checkpoint, Trainer._inner_training_loop

    @functools.wraps(create)
    def create_accelerator_and_postprocess(self: Any) -> None:
        create(self)
        divide_once(self)

    @functools.wraps(report)
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        add_effective_lr(self.optimizer, logs)
        report(self, logs, *args, **kwargs)

    @functools.wraps(start)
    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, LossAwareMixin):  # which has looked already
            resume_from_checkpoint = complete_checkpoint(self, resume_from_checkpoint)
        return start(self, resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(loop)
    def _inner_training_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        forget_window(self)
        return loop(self, *args, **kwargs)

    @functools.wraps(save)
    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        withdraw_checkpoint(self)
        save(self, *args, **kwargs)

    Trainer.train, Trainer._save_checkpoint = train, _save_checkpoint  # type: ignore[method-assign]
    Trainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess  # type: ignore[method-assign]
    Trainer._inner_training_loop = _inner_training_loop  # type: ignore[method-assign]
    Trainer.log = log  # type: ignore[method-assign]


def which_name(argv: list[str]) -> str:
    """What is wrong with the value of `--optim`, for a script that has refused its arguments; empty if nothing is."""
    from transformers.training_args import OptimizerNames

    for i, word in enumerate(argv):
        key, equals, value = word.partition("=")
        if key == "--optim" and (equals or i + 1 < len(argv)):
            try:
                OptimizerNames(value if equals else argv[i + 1])
            except ValueError as error:
                return str(error)
    return ""


def main(argv: list[str] | None = None) -> int:
    """Run a script or module as `python` would. Returns 2 if it cannot be started."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__, file=sys.stderr if not argv else sys.stdout)
        return 0 if argv else 2
    as_module = argv[0] == "-m"
    target = argv[1:2] if as_module else argv[:1]
    if not target or not (as_module or os.path.isfile(target[0])):
        print(f"hf-optim run: no such script: {' '.join(target) or '(none given)'}", file=sys.stderr)
        return 2
    try:
        prepare()
    except ValueError as error:
        print(f"hf-optim run: {error}", file=sys.stderr)
        return 2
    sys.argv = argv[1:] if as_module else argv
    try:
        if as_module:
            sys.path[0] = os.getcwd()
            runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(target[0]))
            runpy.run_path(target[0], run_name="__main__")
    except SystemExit as end:
        if end.code == 2 and which_name(argv):  # argparse has printed every option of the script
            print(f"hf-optim run: {which_name(argv)}", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
