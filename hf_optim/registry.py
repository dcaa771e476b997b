# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The registry: one line per optimizer or preset. Everything else about a name is derived from its class."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import transforms  # noqa: F401  registers the flags
from .core import Optimizer, Option, Place
from .core.flags import Flag, chosen
from .core.options import nearest, read_patterns
from .core.pipeline import View
from .core.precision import slot_dtype
from .optim.adafactor import Adafactor
from .optim.adalo import AdaLo
from .optim.adamomentum import AdaMomentum
from .optim.adamw import AdamW
from .optim.adanorm import AdaNorm
from .optim.am_adamw import AMAdamW
from .optim.am_sgd import AMSGD
from .optim.amos import Amos
from .optim.diffgrad import DiffGrad
from .optim.fractional_adamw import FractionalAdamW
from .optim.muon import Muon
from .optim.nadamw import NAdamW
from .optim.nsgda import NSGDA
from .optim.sgd import SGD
from .optim.sm3 import SM3
from .optim.smmf import SMMF
from .optim.spectral_adamw import SpectralAdamW


logger = logging.getLogger(__name__)

ADAM = {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}
BETAS = {"beta1": "adam_beta1", "beta2": "adam_beta2"}
BETA1 = {"beta1": "adam_beta1"}
ADAM2 = {"beta2": "adam_beta2", "eps": "adam_epsilon"}
ADAM1 = BETA1 | {"eps": "adam_epsilon"}
ENTRY_POINTS = "hf_optim.optimizers"


@dataclass(frozen=True)
class OptimInfo:
    """What is said about an optimizer; the properties below it are derived from its class.

    Args:
        name (`str`): the `--optim` choice.
        cls (`type[Optimizer]`): the class.
        summary (`str`): what it is, in half a sentence.
        paper (`str`): arXiv number, `doi:...` or link of its source.
        lr (`tuple[float, float, float]`, *optional*):
            The lowest learning rate that trains, the best, and the highest; None where `lr` plays no part.
        lr_source (`str`, *optional*): where that range comes from.
        preset (`Mapping[str, Any]`, *optional*): options that make the name out of the class.
        from_args (`Mapping[str, str]`, *optional*): option <- `TrainingArguments` field, where the user changed it.
    """

    name: str
    cls: type[Optimizer]
    summary: str
    paper: str
    lr: tuple[float, float, float] | None = None
    lr_source: str = "60 steps of fine-tuning MiniLM, scripts/sweep_lr.py; longer runs want less"
    preset: Mapping[str, Any] = field(default_factory=dict)
    from_args: Mapping[str, str] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """Where to read about it."""
        if self.paper.startswith("doi:"):
            return "https://doi.org/" + self.paper.removeprefix("doi:")
        return self.paper if "://" in self.paper else "https://huggingface.co/papers/" + self.paper

    @property
    def options(self) -> dict[str, Option]:
        """Every option with its type, default, range and documentation."""
        return self.cls.options()

    @property
    def defaults(self) -> dict[str, Any]:
        """Values of a fresh optimizer: the class's, with the preset on top."""
        return self.cls.resolve(dict(self.preset))

    @property
    def flags(self) -> tuple[str, ...]:
        return self.cls.flags()

    @property
    def techniques(self) -> tuple[type[Flag], ...]:
        """What the preset switches on."""
        return tuple(f for f in chosen(self.defaults, self.flags) if f.flag in self.preset)

    @property
    def doc(self) -> str:
        """The algorithm: the class's documentation, and that of what the preset switches on."""
        return "\n\n".join(inspect.cleandoc(part.__doc__ or "") for part in (self.cls, *self.techniques))

    @property
    def needs_loss(self) -> bool:
        return self.cls.needs_loss

    @property
    def bytes_per_parameter(self) -> float:
        """State bytes per parameter of an fp32 4096 x 4096 weight with the default options."""
        return state_bytes(self.cls, (4096, 4096), self.defaults) / 4096**2

    @property
    def verdicts(self) -> dict[str, str]:
        """What to expect of each way to distribute a run."""
        from .verdicts import table

        return table(self.cls, self.preset)

    def as_dict(self) -> dict[str, Any]:
        """All of the above as plain data: what `hf-optim show NAME --json` prints."""
        preset = dict(self.preset)
        return {
            "name": self.name,
            "class": self.cls.__name__,
            "summary": self.summary,
            "paper": self.link,
            "needs_loss": self.needs_loss,
            "bytes_per_parameter": round(self.bytes_per_parameter, 6),
            "learning_rate": {"range": self.lr, "source": self.lr_source},
            "preset": preset,
            "options": [
                {
                    "name": name,
                    "type": option.type.__name__ + (" | None" if option.optional else ""),
                    "default": preset.get(name, option.default),
                    "range": option.range,
                    "doc": option.doc,
                    "training_argument": self.from_args.get(name),
                }
                for name, option in self.options.items()
            ],
            "flags": list(self.flags),
            "distributed": self.verdicts,
        }


def state_bytes(cls: type[Optimizer], shape: tuple[int, ...], options: Mapping[str, Any]) -> int:
    """Bytes of state of one fp32 parameter, by the optimizer's own `init` on the meta device."""
    p, h = torch.empty(shape, device="meta"), View(dict(options))
    total = 0
    for slot in cls.slots(p, h).values():
        total += torch.Size(slot.shape).numel() * slot_dtype(p, slot, options["state_dtype"]).itemsize
    return total


REGISTRY: dict[str, OptimInfo] = {
    info.name: info
    for info in (
        OptimInfo("adamw", AdamW, "Adam with decoupled decay, the base that flags are measured on", "1711.05101", (0.0001, 0.0003, 0.001), from_args=ADAM),
        OptimInfo("adafactor_corrected", Adafactor, "factored second moments, correcting transformers' Adafactor", "1804.04235", (0.0001, 0.0003, 0.0003), from_args=BETA1),
        OptimInfo("sm3", SM3, "AdaGrad with one accumulator per row and column", "1901.11150", (0.001, 0.003, 0.003)),
        OptimInfo("amos", Amos, "decay and step size that fall together, scaled to the model", "2210.11693", (0.001, 0.003, 0.003)),
        OptimInfo("smmf", SMMF, "Adam with rank-one moments and one bit per sign", "2412.08894", (0.0003, 0.001, 0.001), from_args=ADAM1),
        OptimInfo("nsgda", NSGDA, "momentum normalised to a fixed step length", "2210.04319", (0.01, 0.01, 0.01)),
        OptimInfo("adalo", AdaLo, "momentum with a step size read from the loss", "doi:10.1016/j.ins.2024.121607", from_args=BETAS),
        OptimInfo("nadamw", NAdamW, "AdamW with Nesterov momentum and a momentum warm-up", "1711.05101", (0.0001, 0.0003, 0.0003), from_args=ADAM),
        OptimInfo("adam_atan2", AdamW, "AdamW with an arctangent in place of eps", "2407.05872", (0.0001, 0.0003, 0.001), preset={"denominator": "atan2"}, from_args=BETAS),
        OptimInfo("softplus_adamw", AdamW, "AdamW with a smooth floor under the denominator", "1908.00700", (0.003, 0.01, 0.01), preset={"denominator": "softplus"}, from_args=BETAS),
        OptimInfo("am_adamw", AMAdamW, "AdamW that finds its momentum coefficient, per tensor", "2510.04988", (0.0001, 0.001, 0.001), from_args=ADAM2),
        OptimInfo("am_sgd", AMSGD, "SGD that finds its momentum coefficient", "2510.04988", (0.1, 1, 1)),
        OptimInfo("cautious_adamw", AdamW, "AdamW that drops what disagrees with the gradient", "2411.16085", (0.0001, 0.0003, 0.001), preset={"cautious": True}, from_args=ADAM),
        OptimInfo("cautious_decay_adamw", AdamW, "AdamW that decays only where the step shrinks the weight", "2510.12402", (0.0001, 0.0003, 0.001), preset={"decay": "cautious"}, from_args=ADAM),
        OptimInfo("stable_decay_adamw", AdamW, "AdamW whose decay follows the size of the gradients", "2011.11152", (0.0001, 0.0003, 0.001), preset={"decay": "stable"}, from_args=ADAM),
        OptimInfo("stable_decay_sgd", SGD, "momentum SGD whose decay follows the momentum", "2011.11152", (0.03, 0.1, 0.1), preset={"decay": "stable"}),
        OptimInfo("cpr_adamw", AdamW, "AdamW that bounds each matrix in place of decay", "2311.09058", (0.0001, 0.0003, 0.001), preset={"decay": "cpr"}, from_args=ADAM),
        OptimInfo("spectral_adamw", SpectralAdamW, "AdamW without warm-up: steps bounded by the weights' spectral norm", "2505.21910", (0.0001, 0.001, 0.003), from_args=ADAM),
        OptimInfo("lamb", AdamW, "AdamW whose step is a share of the norm of each matrix", "1904.00962", (0.001, 0.003, 0.003), preset={"trust_ratio": True, "eps": 1e-6}, from_args=ADAM),
        OptimInfo("diffgrad", DiffGrad, "AdamW that slows down where the gradient stands still", "1909.11015", (0.0003, 0.001, 0.001), from_args=ADAM),
        OptimInfo("adamomentum", AdaMomentum, "Adam that divides by the root mean square momentum", "2106.11514", (3e-05, 0.0001, 0.0001), from_args=ADAM),
        OptimInfo("adanorm", AdaNorm, "AdamW that scales weak gradients up to their usual norm", "2210.06364", (0.0001, 0.0003, 0.001), from_args=ADAM),
        OptimInfo("lookahead_adamw", AdamW, "AdamW pulled back to a slow copy every few steps", "1907.08610", (0.0003, 0.001, 0.001), preset={"lookahead": True}, from_args=ADAM),
        OptimInfo("fractional_adamw", FractionalAdamW, "AdamW on a fractional sum of past gradients", "doi:10.3390/math11020316", (0.0001, 0.0003, 0.0003), from_args=ADAM),
        OptimInfo("muon", Muon, "orthogonalised momentum for hidden matrices, AdamW for the rest", "2502.16982", (0.001, 0.003, 0.003), from_args=ADAM),
    )
}  # fmt: skip


def register(info: OptimInfo) -> None:
    """Add an optimizer of your own to the registry.

    Raises:
        `ValueError`: if the name is taken by another class.
        `TypeError`: if the class is not an `hf_optim` optimizer.
    """
    if not (isinstance(info.cls, type) and issubclass(info.cls, Optimizer)):
        raise TypeError(f"OptimInfo {info.name!r}: `cls` must be a subclass of hf_optim.Optimizer, got {info.cls!r}")
    known = REGISTRY.get(info.name)
    if known is not None and known != info:
        raise ValueError(f"the name {info.name!r} is taken by {known.cls.__name__}; choose another one")
    info.cls.resolve(dict(info.preset))
    REGISTRY[info.name] = info


_scanned = False


def _scan_entry_points() -> None:
    """Third-party packages announce their optimizers in the entry-point group `hf_optim.optimizers`."""
    global _scanned
    if _scanned:
        return
    _scanned = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as error:  # a broken plugin must not take every other optimizer down with it
            logger.warning("the optimizer %r of the entry point %s was left out: %s", entry.name, entry.value, error)


def list_optimizers(filter: str = "*") -> list[str]:
    """Names of the optimizers that match a shell pattern, in registry order."""
    _scan_entry_points()
    return fnmatch.filter(REGISTRY, filter)


def info(name: str) -> OptimInfo:
    """Everything known about an optimizer.

    Raises:
        `ValueError`: for an unknown name; the message gives the nearest ones.
    """
    _scan_entry_points()
    if name not in REGISTRY:
        raise ValueError(f"unknown optimizer {name!r}{nearest(name, REGISTRY)} Known: {', '.join(REGISTRY)}.")
    return REGISTRY[name]


def create(name: str, params: Any, **options: Any) -> Optimizer:
    """Make an optimizer by name.

    Args:
        name (`str`): one of [`list_optimizers`].
        params (`torch.nn.Module` or `Iterable`):
            A model, whose parameters are grouped where the optimizer wants to know the kind of their module, without
            those that are frozen now; or parameters or groups, as for any `torch.optim.Optimizer`.
        options: see [`info`]`(name).options`.
    """
    found = info(name)
    options = found.cls.with_preset(found.preset, options)
    if isinstance(params, torch.nn.Module):
        params, options = param_groups(found.cls, params, options)
    return found.cls(params, **options)


def param_groups(
    cls: type[Optimizer],
    model: torch.nn.Module,
    options: Mapping[str, Any],
    decay: set[str] | None = None,
    is_target: Callable[[str, torch.nn.Module], bool] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Groups of the trainable parameters of a model, by the options that their place in it gives them.

    Args:
        decay (`set[str]`, *optional*): names of the parameters that `weight_decay` applies to; all if not given.
        is_target (`Callable`, *optional*): says of (name, module) whether `optim_target_modules` matches it.

    Returns:
        The groups (each shared parameter once), and the options that remain for the constructor.

    Raises:
        `ValueError`, `TypeError`: for a bad option, or a pattern that no trainable parameter fits.
    """
    h = View(cls.completed(cls.checked(options)))
    rules: tuple[Any, ...] = (cls, *chosen(vars(h), cls.flags()))
    outputs = {id(p) for p in _outputs(model)}
    groups: dict[Any, dict[str, Any]] = {}
    places: dict[int, Place] = {}
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in places or not p.requires_grad:
                continue
            full = f"{module_name}.{name}" if module_name else name
            target = None if is_target is None else is_target(module_name, module)
            at = places[id(p)] = Place(module, full, p, id(p) in outputs, target)
            own = {k: v for rule in rules for k, v in rule.options_for(at, h).items()}
            if decay is not None and full not in decay:
                own["weight_decay"] = 0.0
            key = tuple(sorted(own.items()))
            groups.setdefault(key, {"params": [], **own})["params"].append(p)
    _refuse_unmatched(cls, vars(h), list(places.values()))
    return list(groups.values()), {k: v for k, v in options.items() if k not in cls.by_name}


def _refuse_unmatched(cls: type[Optimizer], values: Mapping[str, Any], places: list[Place]) -> None:
    if places and all(at.is_target is False for at in places):
        raise ValueError("`optim_target_modules` matches no module with a trainable parameter")
    for name in (name for name, option in cls.options().items() if option.patterns):
        for pattern, _ in read_patterns(values[name]):
            if not any(pattern.search(at.name) for at in places):
                raise ValueError(f"{cls.__name__}: `{name}`: no trainable parameter is named {pattern.pattern!r}")


def _outputs(model: torch.nn.Module) -> Iterable[Tensor]:
    """Parameters of what a transformers model names as its output embeddings (peft may wrap them); else of the last
    module that holds a trainable matrix."""
    named = getattr(model, "get_output_embeddings", lambda: None)()
    if named is not None:
        return named.parameters()
    holders = [m for m in model.modules() if any(p.ndim > 1 and p.requires_grad for p in m.parameters(recurse=False))]
    return (holders[-1] if holders else model).parameters(recurse=False)
