# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of earlier releases still load, bit for bit, and training goes on from them as it did then.

`python tests/test_golden.py` writes the files that are missing. One that exists is never rewritten: where a release
changes an algorithm on purpose, delete its file, run the script and say so in the release notes.
"""

from pathlib import Path

import pytest
import torch
from conftest import advance, make_params
from engine import BF16, brisk, build, frozen, rich

import hf_optim


GOLDEN = Path(__file__).parent / "data" / "golden"
SHAPES = ((4, 3), (5,))
KAHAN = {"precision": "kahan", "state_dtype": "bfloat16"}
VARIANTS = {  # dtype of the weights, and options
    "fp32": (torch.float32, lambda name: {}),
    "bf16": (BF16, brisk),
    "rich": (BF16, lambda name: {**brisk(name), **rich(name), **KAHAN}),
}


def record(name, variant):
    """Weights and checkpoint after two steps, and the weights after three more, each in one vector."""
    dtype, options = VARIANTS[variant]
    optimizer, params = build(name, SHAPES, dtype, **options(name))
    advance(optimizer, params, 2)
    kept = {"weights": flat(params), "checkpoint": optimizer.state_dict()}
    return {**{k: frozen_copy(v) for k, v in kept.items()}, "after": three_more(optimizer, params)}


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def frozen_copy(value):
    """A copy that later steps do not change, without storage that it shares."""
    if isinstance(value, dict):
        return {k: frozen_copy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [frozen_copy(v) for v in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def three_more(optimizer, params):
    advance(optimizer, params, 3, first=3)
    return flat(params)


def stored(name):
    path = GOLDEN / f"{name}.pt"
    if not path.exists():
        pytest.skip(f"not released yet; `python {Path(__file__).name}` keeps the checkpoints of a release")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_checkpoint_loads_and_goes_on(name, variant):
    kept = stored(name)[variant]
    dtype, options = VARIANTS[variant]
    params = make_params(SHAPES, dtype, seed=1)
    optimizer = hf_optim.create(name, params, **options(name))
    optimizer.load_state_dict(kept["checkpoint"])
    loaded = optimizer.state_dict()
    converted = optimizer.convert_state_dict(kept["checkpoint"])  # buffers may have been renamed since
    assert frozen(loaded["state"]) == frozen(converted["state"])
    for group, saved in zip(loaded["param_groups"], kept["checkpoint"]["param_groups"]):
        assert frozen({key: group[key] for key in saved}) == frozen(saved)  # options may have been added since
    with torch.no_grad():
        for p, values in zip(params, kept["weights"].split([p.numel() for p in params])):
            p.copy_(values.view_as(p))
    before = flat(params)
    after = three_more(optimizer, params)
    assert torch.equal(before, kept["weights"]) and not torch.equal(before, after)
    # not bit for bit: exponentials, logarithms and roots are other routines on other processors
    rounding = {"rtol": 2.0**-7, "atol": 1e-6} if dtype == BF16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(after, kept["after"], **rounding)


def test_files_are_small_and_of_optimizers_that_exist():
    files = list(GOLDEN.glob("*.pt"))
    assert files and {path.stem for path in files} <= set(hf_optim.list_optimizers())
    assert max(path.stat().st_size for path in files) < 20_000


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for missing in hf_optim.list_optimizers():
        if not (GOLDEN / f"{missing}.pt").exists():
            torch.save({variant: record(missing, variant) for variant in VARIANTS}, GOLDEN / f"{missing}.pt")
            print(f"wrote {missing}.pt")
