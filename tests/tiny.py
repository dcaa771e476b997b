# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A two-layer GPT-2 and a few random sequences: a real model and Trainer in a second."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

import hf_optim


def model(dropout=0.0, seed=0):
    set_seed(seed)
    rates = {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes, **rates))


def data(rows=64, seed=0, padded=False):
    """Token sequences; with `padded` they have a different number of labels each, as real ones do."""
    draw = torch.Generator().manual_seed(seed)
    rows_ = []
    for i in range(rows):
        ids = torch.randint(0, 64, (12,), generator=draw)
        labels = ids.clone()
        if padded:
            labels[: i % 9] = -100
        rows_.append({"input_ids": ids, "labels": labels})
    return rows_


def arguments(**options):
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(tempfile.mkdtemp(), **{**fixed, "max_steps": 4, "learning_rate": 1e-2, **options})


def trainer(cls=None, net=None, rows=None, extra=None, **options):
    cls = cls or hf_optim.LossAwareTrainer
    return cls(net or model(), arguments(**options), train_dataset=rows or data(), **(extra or {}))


def losses_seen(run):
    """The losses that reach the optimizer of a trainer; filled while it trains."""
    seen, create = [], run.create_optimizer

    def create_optimizer(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        report = optimizer.report_loss

        def report_loss(loss):
            seen.append(float(loss))
            report(loss)

        optimizer.report_loss = report_loss
        return optimizer

    run.create_optimizer = create_optimizer
    return seen


def weights(run):
    return [p.detach().clone() for p in run.model.parameters()]
