# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fifty steps beside independent implementations. Each test is skipped where its package is not installed.

The packages are the `reference` extra. Where they deviate from the rule that we implement, the settings here say how
the two are made equal. `--junit-xml` keeps the largest difference of each run beside its tolerance. Left out: other
Adafactors (transformers' is in test_hazards.py) and rules of which no faithful implementation was found.
"""

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import fill_grads, make_params

import hf_optim
from hf_optim.optim.muon import Muon
from hf_optim.optim.sgd import SGD


STEPS = 50
SHAPES = [(20, 30), (30, 8), (7,), ()]
MATRICES = [(20, 30), (30, 20), (16, 16)]


def gap(a, b, ours, theirs, steps=STEPS, scale=1.0, before=None):
    """The largest difference between two runs with the same gradients, relative to weights of unit scale."""
    largest, start = 0.0, [p.detach().clone() for p in ours]
    for t in range(1, steps + 1):
        fill_grads(ours, seed=t, scale=scale if isinstance(scale, float) else scale(t))
        for p, q in zip(ours, theirs):
            q.grad = p.grad.clone()
        if before is not None:
            before(theirs)
        a.step()
        b.step()
        moved = [(p.detach() - q.detach()).abs().max().item() for p, q in zip(ours, theirs)]
        largest = max(largest, *moved)
    assert all((p.detach() - x).abs().max() > 1e-4 for p, x in zip(ours, start)), "nothing was compared"
    return largest


def pair(shapes=SHAPES, dtype=torch.float64):
    return make_params(shapes, dtype), make_params(shapes, dtype)


@pytest.fixture
def agree(record_property):
    """Checks a difference against its tolerance and keeps it."""

    def check(largest, tolerance):
        record_property("largest", f"{largest:.1e}")
        record_property("tolerance", f"{tolerance:.1e}")
        assert largest <= tolerance, f"{largest:.2e} > {tolerance:.0e}"

    return check


# ---- torch ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_and_torch(agree, amsgrad):
    ours, theirs = pair()
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad}
    a = hf_optim.AdamW(ours, beta1=0.8, beta2=0.9, eps=1e-6, **options)
    b = torch.optim.AdamW(theirs, betas=(0.8, 0.9), eps=1e-6, **options)
    agree(gap(a, b, ours, theirs), 1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_nadamw_and_torch(agree, decay):
    ours, theirs = pair()
    a = hf_optim.create("nadamw", ours, lr=1e-2, weight_decay=decay, momentum_decay=0.05)
    b = torch.optim.NAdam(theirs, lr=1e-2, weight_decay=decay, momentum_decay=0.05, decoupled_weight_decay=True)
    agree(gap(a, b, ours, theirs), 1e-6)  # torch keeps the product of its schedule in fp32


@pytest.mark.parametrize("momentum, dampening", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.3)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_and_torch(agree, momentum, dampening, decay):
    ours, theirs = pair()
    a = SGD(ours, lr=1e-2, momentum=momentum, dampening=dampening, weight_decay=decay, decay="coupled")
    b = torch.optim.SGD(theirs, lr=1e-2, momentum=momentum, dampening=dampening, weight_decay=decay)
    agree(gap(a, b, ours, theirs), 1e-13)


@pytest.fixture
def exact_iteration(monkeypatch):
    """torch iterates in bf16; a copy in its place lets a run be compared to rounding."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale, adjust", [("match_rms", "match_rms_adamw"), ("original", "original")])
def test_muon_and_torch(agree, exact_iteration, nesterov, scale, adjust):
    ours, theirs = pair(MATRICES)
    options = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov}
    a = Muon(ours, scale=scale, rule="muon", **options)
    b = torch.optim.Muon(theirs, adjust_lr_fn=adjust, **options)
    agree(gap(a, b, ours, theirs), 1e-10)


def first_step(a, b, ours, theirs):
    """The largest distance of two first steps over the size of the step, of any tensor."""
    old = [p.detach().clone() for p in ours]
    gap(a, b, ours, theirs, steps=1)
    return max(((p - q).norm() / (x - q).norm()).item() for p, q, x in zip(ours, theirs, old))


def test_muon_and_torch_in_bf16(agree):
    ours, theirs = pair(MATRICES, torch.float32)
    a = Muon(ours, lr=1e-2, rule="muon")
    b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    agree(first_step(a, b, ours, theirs), 0.03)


# ---- pytorch_optimizer ---------------------------------------------------------------------------------------------
def reference():
    """pytorch_optimizer 4.1 or later: 3.9 is wrong in five of these rules."""
    package = pytest.importorskip("pytorch_optimizer")
    version = importlib.metadata.version("pytorch_optimizer")
    if tuple(map(int, version.split(".")[:2])) < (4, 1):
        pytest.skip(f"pytorch_optimizer {version} is older than 4.1")
    return package


@pytest.mark.parametrize("amsgrad", [False, True])
def test_stable_decay_and_pytorch_optimizer(agree, amsgrad):
    # it adds eps to the root in the decay, and the clamp of ours must not act
    ours, theirs = pair()
    options = {"lr": 1e-2, "weight_decay": 1e-2}
    a = hf_optim.create("stable_decay_adamw", ours, eps=1e-12, stable_cap=1.0, amsgrad=amsgrad, **options)
    b = reference().AdamS(theirs, eps=1e-12, ams_bound=amsgrad, **options)
    agree(gap(a, b, ours, theirs), 1e-11)


def test_diffgrad_and_pytorch_optimizer(agree):
    # it adds eps before the bias correction, so eps is next to nothing here
    ours, theirs = pair()
    a = hf_optim.create("diffgrad", ours, lr=1e-2, weight_decay=0.1, eps=1e-20)
    b = reference().DiffGrad(theirs, lr=1e-2, weight_decay=0.1, eps=1e-20, rectify=False)
    agree(gap(a, b, ours, theirs), 1e-7)


@pytest.mark.parametrize("fall", [1.0, 0.8])
def test_adanorm_and_pytorch_optimizer(agree, fall):
    # with falling gradients its correction acts; the bound of ours must not
    ours, theirs = pair([(20, 30), (30, 8), (7,)])
    a = hf_optim.create("adanorm", ours, lr=1e-2, largest=1e9, eps=1e-12)
    b = reference().AdaNorm(theirs, lr=1e-2, betas=(0.9, 0.999), r=0.95, eps=1e-12)
    agree(gap(a, b, ours, theirs, scale=lambda t: fall**t), 1e-6)


@pytest.mark.parametrize("k, alpha", [(5, 0.5), (3, 0.8), (1, 0.3)])
def test_lookahead_and_pytorch_optimizer(agree, k, alpha):
    ours, theirs = pair()
    a = hf_optim.create("lookahead_adamw", ours, lr=1e-2, lookahead_k=k, lookahead_alpha=alpha)
    b = reference().Lookahead(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0), k=k, alpha=alpha)
    agree(gap(a, b, ours, theirs), 1e-13)


def test_lamb_without_decay_and_pytorch_optimizer(agree):
    # its Lamb corrects the step for the bias after the ratio; told not to, it leaves the correction out, a factor of
    # the whole direction that the ratio divides out where eps and decay are 0 and the norm is below its clamp at 10
    ours, theirs = pair([(12, 6), (5, 9)])
    for p in (*ours, *theirs):
        p.data *= 0.1
    a = hf_optim.create("lamb", ours, lr=1e-2, eps=0.0, trust_floor=0.0)
    b = reference().Lamb(theirs, lr=1e-2, weight_decay=0.0, eps=0.0, max_grad_norm=0.0, adam_debias=True)
    agree(gap(a, b, ours, theirs), 1e-13)


@pytest.mark.parametrize("adjusted, scale", [(True, "match_rms"), (False, "original")])
def test_muon_and_pytorch_optimizer(agree, monkeypatch, adjusted, scale):
    theirs_in_bf16 = sys.modules[reference().Muon.__mro__[1].__module__].zero_power_via_newton_schulz_5
    exact = tuple(torch.float64 if x is torch.bfloat16 else x for x in theirs_in_bf16.__defaults__)
    monkeypatch.setattr(theirs_in_bf16, "__defaults__", exact)
    ours, theirs = pair([*MATRICES, (6, 2, 3, 3)])
    a = Muon(ours, lr=1e-2, scale=scale, rule="muon")
    b = reference().Muon([{"params": theirs, "use_muon": True}], lr=1e-2, use_adjusted_lr=adjusted)
    agree(gap(a, b, ours, theirs), 1e-10)


def test_agc_and_pytorch_optimizer(agree):
    # of three dimensions it reduces one: matrices and vectors only
    agc = reference().optimizer.agc
    ours, theirs = pair([(20, 30), (30, 8)], torch.float64)
    a = SGD(ours, lr=0.1, momentum=0.0, agc=True, agc_clip=0.05)
    b = torch.optim.SGD(theirs, lr=0.1)

    def clip(params):
        for p in params:
            p.grad = agc(p.detach(), p.grad, 1e-3, 0.05)

    agree(gap(a, b, ours, theirs, before=clip), 1e-13)


def test_centralize_and_pytorch_optimizer(agree):
    centralize = reference().centralize_gradient
    ours, theirs = pair([(20, 30), (6, 3, 5), (4, 3, 2, 2), (7,)])
    a, b = SGD(ours, lr=0.1, momentum=0.0, centralize=True), torch.optim.SGD(theirs, lr=0.1)
    agree(gap(a, b, ours, theirs, before=lambda params: [centralize(p.grad) for p in params]), 1e-13)


# ---- timm ----------------------------------------------------------------------------------------------------------
def timm(path):
    """A module of timm by its file: importing the package needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("could not import 'timm'")
    root = Path(spec.submodule_search_locations[0])
    package, name = path.rsplit(".", 1)
    stubs = [".".join(["hf_optim_timm", *package.split(".")[:i]]) for i in range(package.count(".") + 2)]
    for i, stub in enumerate(stubs):
        if stub not in sys.modules:
            sys.modules[stub] = types.ModuleType(stub)
            sys.modules[stub].__path__ = [str(root.joinpath(*package.split(".")[:i]))]
    return importlib.import_module(f"hf_optim_timm.{path}")


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [False, True])
def test_lamb_and_timm(agree, decay, clip):
    ours, theirs = pair([(20, 30), (30, 8), (7,)])
    as_theirs = {"trust_floor": 0.0, "trust_vectors": True, "trust_clip": 1.0 if clip else None}
    a = hf_optim.create("lamb", ours, lr=1e-2, weight_decay=decay, **as_theirs)
    options = {"max_grad_norm": None, "always_adapt": True, "trust_clip": clip}
    b = timm("optim.lamb").Lamb(theirs, lr=1e-2, weight_decay=decay, **options)
    agree(gap(a, b, ours, theirs), 1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_cautious_and_timm(agree, decay):
    ours, theirs = pair()
    a = hf_optim.create("cautious_adamw", ours, lr=1e-2, weight_decay=decay)
    b = timm("optim.adamw").AdamWLegacy(theirs, lr=1e-2, weight_decay=decay, caution=True)
    agree(gap(a, b, ours, theirs), 1e-13)


def test_agc_and_timm(agree):
    agc = timm("utils.agc").adaptive_clip_grad
    ours, theirs = pair([(20, 30), (5, 3, 7), (4, 3, 2, 2), (7,), ()])
    a, b = SGD(ours, lr=0.1, momentum=0.0, agc=True, agc_clip=0.05), torch.optim.SGD(theirs, lr=0.1)
    agree(gap(a, b, ours, theirs, before=lambda params: agc(params, clip_factor=0.05)), 1e-13)


# ---- adam-atan2-pytorch --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("a, b", [(1.27, 1.0), (4.0, 4.0)])
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_atan2_and_adam_atan2_pytorch(agree, a, b, scale):
    package = pytest.importorskip("adam_atan2_pytorch")
    ours, theirs = pair()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    x = hf_optim.create("adam_atan2", ours, beta2=0.99, atan2_a=a, atan2_b=b, **options)
    y = package.AdamAtan2(theirs, betas=(0.9, 0.99), a=a, b=b, **options)
    agree(gap(x, y, ours, theirs, scale=scale), 1e-13)


# ---- pytorch-cpr ---------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")  # it calls what torch has deprecated
@pytest.mark.parametrize("reg", ["l2", "l1", "std", "huber"])
@pytest.mark.parametrize("init", ["uniform", "dependent", "warm_start"])
def test_cpr_and_pytorch_cpr(agree, init, reg):
    # it bounds sums, at a rate over the number of entries, and keeps bound and multiplier in fp32
    package = pytest.importorskip("pytorch_cpr")
    (first,), n = make_params([(12, 9)]), 108
    size = {"l2": first.square().mean(), "l1": first.abs().mean(), "std": first.std()}
    size["huber"] = torch.nn.functional.huber_loss(first, 0 * first)
    kappa, count = 0.9 * size[reg].item(), 1 if reg == "std" else n
    ours_say = {"uniform": {"cpr_kappa": kappa}, "dependent": {"cpr_kappa": 0.9}, "warm_start": {"cpr_steps": 8}}
    they_say = {"uniform": kappa * count, "dependent": 0.9, "warm_start": 8}
    ours, theirs = pair([(12, 9)])
    rate = 2.0 if reg == "std" else 0.02
    a = hf_optim.create(
        "cpr_adamw", ours, lr=1e-2, cpr_reg=reg, cpr_init=init, cpr_rate=rate, cpr_cap=1.0, **ours_say[init]
    )
    group = {"params": theirs, "regularize": True}
    b = package.AdamCPR(
        [group], lr=1e-2, kappa_init_method=init, kappa_init_param=they_say[init], reg_function=reg,
        kappa_update=rate, foreach=False,
    )  # fmt: skip
    multipliers = []

    def watch(_):
        multipliers.append(b.state[theirs[0]]["lagmul"].item() if b.state else 0.0)

    agree(gap(a, b, ours, theirs, before=watch), 1e-6)
    assert sum(m > 0 for m in multipliers) > 3, "the bound never acted"
