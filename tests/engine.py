# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the engine share: parameters of every rank, and comparisons that look at every bit."""

import copy
import io

import torch
from conftest import make_params

import hf_optim
from hf_optim.core import FLAGS
from hf_optim.core.pipeline import View


# every rank, an axis of size 1, a single element, nothing at all; below CHUNK in number, so one compiled size
SHAPES = ((4, 6), (5,), (), (3, 2, 2), (0, 3), (1,), (7, 1))
BF16 = torch.bfloat16


def apart(name):
    """Options without sums over the whole model: with them, tensors depend on each other by definition."""
    preset = hf_optim.info(name).preset.get("decay") == "stable" and "momentum" not in hf_optim.info(name).options
    return {"am_sgd": {"scope": "tensor"}}.get(name, {"decay": "decoupled"} if preset else {})


def moments(name):
    """Options that give every optimizer its average gradient or update, also where it has none by default."""
    options = hf_optim.info(name).options
    return {**apart(name), **{k: 0.9 for k in ("momentum", "beta1") if k in options and not options[k].default}}


def rich(name):
    """Options under which an optimizer keeps all the state it can."""
    info = hf_optim.info(name)
    maximum = "amsgrad" in info.options and "amsgrad" not in info.cls.refuses(View(info.defaults))
    return {**moments(name), "lookahead": True, "lookahead_k": 2, **({"amsgrad": True} if maximum else {})}


def settings_of_flags():
    """Option of a technique -> the flag and value it needs: {"atan2_a": {"denominator": "atan2"}, ...}."""
    return {key: {flag: value} for flag, members in FLAGS.items() for value, m in members.items() for key in m.options}


def build(name, shapes=SHAPES, dtype=torch.float32, seed=0, device="cpu", **options):
    """(optimizer, its parameters). No weight decay where a bound takes its place; each tensor on its own, even where
    the default looks at the whole model."""
    if hf_optim.info(name).preset.get("decay") == "cpr" and "decay" not in options:
        options.pop("weight_decay", None)
    options = {**apart(name), **options}
    params = make_params(shapes, dtype, seed, device)
    return hf_optim.create(name, params, **options), params


def bits(x):
    """The bytes of a tensor, so that NaN, -0.0 and dtypes are told apart."""
    x = x.detach().contiguous()
    return x.dtype, tuple(x.shape), x.reshape(-1).view(torch.uint8).tolist() if x.numel() else []


def frozen(value):
    """A nested value in a form that `==` compares bit for bit and that later steps cannot change."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {k: frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(v) for v in value]
    return type(value).__name__, value


def everything(optimizer):
    """Weights, state and groups of an optimizer, frozen."""
    return frozen({"weights": list(optimizer.parameters()), **optimizer.state_dict()})


def reloaded(state_dict):
    """The state dict after a trip through a file, read as Trainer reads it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def twin(optimizer, params):
    """A fresh optimizer of the same kind on copies of the parameters, with the first one's checkpoint loaded."""
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    groups, sizes, start = [], [len(g["params"]) for g in optimizer.param_groups], 0
    for size in sizes:
        groups.append({"params": theirs[start : start + size]})
        start += size
    new = type(optimizer)(groups)
    new.load_state_dict(reloaded(copy.deepcopy(optimizer.state_dict())))
    return new, theirs


def flags_on(name):
    """Every flag that can act, at a value that is not its default."""
    known = hf_optim.info(name).options
    wanted = {"centralize": True, "cautious": True, "decay": "cautious", "lookahead": True, "weight_decay": 0.1}
    return {**moments(name), **{k: v for k, v in wanted.items() if k in known}}


def follows_lr(name):
    """Options with which `lr` sets the step, also where the rule finds the size of its steps elsewhere."""
    return {k: True for k in ("follow_schedule",) if k in hf_optim.info(name).options}


def brisk(name):
    """Options for steps that even bf16 weights feel at once."""
    return {"kappa": 0.01} if "kappa" in hf_optim.info(name).options else {"lr": 0.1}


def as_compiled(graph):
    """The traced graph called as its compiled code would be: each symbol is a size of the first argument that has it,
    a weight, say. The gradient that comes as backward left it is read as a tensor of that size."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]

    def run(args):
        sizes = {}
        for x, arg in zip(inputs, args):
            for size, n in zip(getattr(x, "shape", [x]), getattr(arg, "shape", [arg])):  # spans are numbers
                sizes.setdefault(str(size), n)
        seen = [
            arg if isinstance(arg, int) else arg.view([sizes[str(size)] for size in x.shape])
            for x, arg in zip(inputs, args)
        ]
        return graph.forward(*seen)  # not `graph(...)`: CommDebugMode would trip over calls of modules

    return run
