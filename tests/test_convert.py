# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A transformers Adafactor checkpoint continues under `adafactor_corrected`."""

import pytest
import torch
from transformers.optimization import Adafactor as Theirs

import hf_optim


SHAPES = [(6, 9), (9, 6), (7,), (), (3, 4, 6)]  # all factored along their last two axes by both


def run(optimizer, params, first, last):
    for t in range(first, last):
        draw = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()


def train_theirs(shapes, steps, **options):
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
    optimizer = Theirs(params, **options)
    run(optimizer, params, 0, steps)
    return params, optimizer


def continue_ours(params, theirs):
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = hf_optim.create("adafactor_corrected", copies)
    ours.load_state_dict(theirs.state_dict())
    return copies, ours


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2, "relative_step": False, "scale_parameter": False},
        {"lr": 1e-2, "relative_step": False, "scale_parameter": True, "weight_decay": 0.1},
        {"lr": None, "relative_step": True, "scale_parameter": True, "warmup_init": True},
        {"lr": 3e-3, "relative_step": False, "scale_parameter": False, "eps": (1e-20, 1e-2), "decay_rate": -0.7},
        # with a constant step size, averaging lr * u and lr times averaging u are the same
        {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
    ],
    ids=["trainer", "scaled", "paper", "constants", "momentum"],
)
def test_continues_where_transformers_stopped(options):
    params, theirs = train_theirs(SHAPES, 10, **options)
    copies, ours = continue_ours(params, theirs)
    run(theirs, params, 10, 30)
    run(ours, copies, 10, 30)
    for p, q in zip(params, copies):
        torch.testing.assert_close(q, p, atol=2e-6, rtol=2e-6)


def test_convolution_is_refactored_from_its_estimate():
    params, theirs = train_theirs([(8, 6, 3, 3)], 10, lr=1e-2, relative_step=False, scale_parameter=False)
    old = theirs.state[params[0]]
    row, col = old["exp_avg_sq_row"].double(), old["exp_avg_sq_col"].double()
    full = row.unsqueeze(-1) * col.unsqueeze(-2) / row.mean(-1, keepdim=True).unsqueeze(-1)
    copies, ours = continue_ours(params, theirs)
    state = ours.state[copies[0]]
    assert state["row"].shape == (8, 3, 3) and state["col"].shape == (6, 3, 3) and state["step"] == 10
    torch.testing.assert_close(state["row"].double(), full.mean(1))
    torch.testing.assert_close(state["col"].double(), full.mean(0))
    run(ours, copies, 10, 12)


def test_statistics_rounded_by_a_bf16_resume_become_fp32():
    params, theirs = train_theirs([(6, 9)], 3, lr=1e-2, relative_step=False, scale_parameter=False)
    saved = theirs.state_dict()
    saved["state"][0] = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in saved["state"][0].items()}
    copies = [torch.nn.Parameter(params[0].detach().bfloat16())]
    ours = hf_optim.create("adafactor_corrected", copies)
    ours.load_state_dict(saved)
    assert ours.state[copies[0]]["row"].dtype == torch.float32
