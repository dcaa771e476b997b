# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What every test file shares: `name` runs over the registry, `class_name` over one name of each class, `second_name`
over every second one (`pytest -m slow` takes the rest); parameters and gradients come from a seed."""

import gc

import pytest
import torch

import hf_optim


torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", hf_optim.list_optimizers())
    if "class_name" in metafunc.fixturenames:
        first = {hf_optim.info(n).cls: n for n in reversed(hf_optim.list_optimizers())}
        metafunc.parametrize("class_name", first.values())
    if "second_name" in metafunc.fixturenames:
        names = enumerate(hf_optim.list_optimizers())
        metafunc.parametrize("second_name", [pytest.param(n, marks=[pytest.mark.slow] * (i % 2)) for i, n in names])


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


# one name for each kind of state: element-wise, factored, covering maxima, packed signs, slow weights, bounds, loss
LAYOUTS = ("adalo", "adamw", "adafactor_corrected", "sm3", "smmf", "amos", "lookahead_adamw", "cpr_adamw")


def slow_but(*fast):
    """All names of the registry as parameters; all but `fast` are left to `-m slow`."""
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in hf_optim.list_optimizers()]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_params(shapes, dtype=torch.float32, seed=0, device="cpu"):
    """Leaf tensors of these shapes, drawn from N(0, 1) (in float64, then rounded to `dtype`)."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(x.to(device, dtype)) for x in draws]


def fill_grads(params, seed, scale=1.0, dtype=None):
    """Give every parameter a fresh gradient from scale * N(0, 1), the same for the same seed. Returns them."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if dtype is not None:
            p.grad_dtype = dtype  # a gradient in another dtype than its weight
        p.grad = g.to(p.device, dtype or p.dtype)
    return [p.grad for p in params]


def loss_at(t):
    """A training loss that falls and wobbles; step `t` counts from 1."""
    return 3.0 / t**0.5 + 0.1 * (t % 3)


def advance(optimizer, params, steps, first=1, scale=1.0):
    """Steps number `first`, `first + 1`, ... with gradients (and, where needed, losses) of those numbers."""
    for t in range(first, first + steps):
        fill_grads(params, seed=t, scale=scale)
        optimizer.step(loss=loss_at(t) if optimizer.needs_loss else None)


@pytest.fixture(scope="module")
def forking_trainers():
    """Our names are choices of Trainer, which starts often, and in forks."""
    hf_optim.register()
    gc.collect(), gc.freeze()  # Trainer collects garbage at every start: not that of all modules, copied in a fork
    yield
    gc.unfreeze()
