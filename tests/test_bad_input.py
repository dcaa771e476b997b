# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Bad options, mangled `--optim_args` and tensors of any form: refused by name, or right.

Everything is drawn from seeds, so a failure comes back. The long runs are `slow`.
"""

import json
import random

import oracles
import pytest
import test_options
import test_oracles
import torch
from conftest import make_params

import hf_optim
from hf_optim.trainer.register import TRAINER_OPTIONS, parse_optim_args


VALUES = 400  # bad option values per name
STRINGS = 40  # `--optim_args` per name
CASES = 200  # random tensors per name, of which the ordinary run takes
SAMPLE = 6


# ---- option values -------------------------------------------------------------------------------------------------


def far_outside(option, draw):
    """A number beyond one end of the range, at a random distance."""
    low = option.ge if option.ge is not None else option.gt
    high = option.le if option.le is not None else option.lt
    ends = [(end, side) for end, side in ((low, -1), (high, 1)) if end is not None]
    end, side = draw.choice(ends)
    distance = 10.0 ** draw.uniform(0, 30)
    return option.type(end + side * (distance if option.type is float else int(distance) + 1))


def unhashable_switch(name, option, value):
    """A list or the like for a flag, beside a preset."""
    info = hf_optim.info(name)
    return bool(info.preset) and option.name in info.flags and type(value).__hash__ is None


def bad_values(name):
    """(option, value) to refuse: every kind of wrong value for every option, then numbers out of range."""
    draw, table = random.Random(name), hf_optim.info(name).options
    known = [(o, value) for o in table.values() for value in test_options.wrong(o) + test_options.outside(o)]
    known = [(o, value) for o, value in known if (o.name, value is None) != ("lr", True)]  # None: the default
    known = [(o, value) for o, value in known if not unhashable_switch(name, o, value)]  # the test below has them
    bounded = [o for o in table.values() if o.type in (int, float) and test_options.outside(o)]
    draw.shuffle(known)
    found = known[: VALUES - 100]
    missing = set(table) - {option.name for option, _ in found}
    found = [pair for pair in known if pair[0].name in missing] + found
    return (found + [(o, far_outside(o, draw)) for o in draw.choices(bounded, k=VALUES)])[:VALUES]


def test_four_hundred_bad_values_are_refused_by_name_value_and_range(name):
    pairs = bad_values(name)
    assert len(pairs) == VALUES and {o.name for o, _ in pairs} == set(hf_optim.info(name).options)
    assert not not_refused(name, pairs)


def test_a_list_for_a_flag_is_refused_by_name(name):
    info = hf_optim.info(name)
    assert not not_refused(name, [(info.options[flag], value) for flag in info.flags for value in ([0.5], {"a": 1})])


def test_bad_values_are_refused_before_they_meet_the_model(name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    assert not not_refused(name, bad_values(name), model)


def not_refused(name, pairs, model=None):
    """What was accepted, or refused without naming argument, range and value."""
    accepted = []
    for option, value in pairs:
        others = test_options.context(name, option.name)
        params = make_params([(3,)]) if model is None else model
        try:
            hf_optim.create(name, params, **{**others, option.name: value})
        except (ValueError, TypeError) as error:
            text = str(error)
            named = f"`{option.name}`" in text and option.range in text
            if not named or not (repr(value) in text or hasattr(value, "shape")):
                accepted.append(f"{option.name}={value!r}: {text}")
        else:
            accepted.append(f"{option.name}={value!r} was accepted")
    return "\n".join(accepted)


# ---- --optim_args --------------------------------------------------------------------------------------------------


def good_pair(info, draw):
    option = draw.choice([o for key, o in info.options.items() if key not in TRAINER_OPTIONS])
    return option.name, draw.choice(test_options.inside(option))


def good_pairs(info, draw):
    """One to three options, mostly with those that they need to act."""
    pairs = {}
    for _ in range(draw.randint(1, 3)):
        key, value = good_pair(info, draw)
        pairs |= test_options.context(info.name, key) if draw.random() < 0.7 else {}
        pairs[key] = value
    return pairs


def bad_pair(info, draw):
    """A pair that must be refused: an unknown name, one that Trainer sets, or a value that cannot be."""
    kind = draw.choice(("typo", "trainer", "value", "value"))
    key, value = good_pair(info, draw)
    if kind == "typo":
        return draw.choice((key + "s", key[1:] or "x", key.upper(), f"optim_{key}", "betas")), value
    if kind == "trainer":
        return draw.choice((*TRAINER_OPTIONS, "learning_rate")), 0.1
    numbers = [o for o in info.options.values() if o.type in (int, float) and o.name not in TRAINER_OPTIONS]
    option = draw.choice(numbers)
    return option.name, draw.choice(["abc", "nan", "1e999", "0.9;0.99", *map(str, test_options.outside(option))])


def text_of(pairs, draw):
    if draw.random() < 0.25:
        return json.dumps(dict(pairs))
    space = draw.choice(("", " "))
    return ",".join(f"{key}{space}={space}{value}" for key, value in pairs)


def random_arguments(name):
    """(text, its pairs, the keys that must not pass) for a name; keys are given once."""
    info, draw = hf_optim.info(name), random.Random(f"arguments of {name}")
    for _ in range(STRINGS):
        pairs = good_pairs(info, draw)
        bad = set()
        if draw.random() < 0.5:
            key, value = bad_pair(info, draw)
            pairs[key] = value
            bad = {key}
        items = list(pairs.items())
        draw.shuffle(items)
        yield text_of(items, draw), pairs, bad


def outcome(name, text, pairs, bad):
    """Accepted or refused; an assertion fails where a key was ignored or not named."""
    info = hf_optim.info(name)
    try:
        parsed = parse_optim_args(info, text)
        assert set(parsed) == set(pairs) and not bad, text
        group = hf_optim.create(name, make_params([(3, 2)]), **parsed).param_groups[0]
    except (ValueError, TypeError) as error:
        said = str(error)
        assert any(f"`{key}" in said for key in pairs), said
        assert bad or any(why in said for why in ("cannot act", "has no effect")), (text, said)
        return "refused"
    for key, value in pairs.items():
        assert group[key] == value and type(group[key]) is type(value), (text, key)
    return "accepted"


def test_no_key_of_optim_args_is_ignored(name):
    found = [outcome(name, *case) for case in random_arguments(name)]
    assert len(found) == STRINGS and found.count("accepted") >= 5 and found.count("refused") >= STRINGS // 4


def test_there_are_a_thousand_strings():
    assert STRINGS * len(hf_optim.list_optimizers()) >= 1000
    assert VALUES * len(hf_optim.list_optimizers()) >= 10_000
    assert CASES * len(hf_optim.list_optimizers()) >= 5000


# ---- tensors -------------------------------------------------------------------------------------------------------


def laid_out(x, how):
    """The same numbers in other strides, where the shape allows."""
    if how == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    if how == "channels_last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x


class Strided(test_oracles.Run):
    """A run whose weights and gradients lie in memory in any way."""

    def __init__(self, name, shapes, weights, gradients, **options):
        super().__init__(name, shapes, **options)
        self.gradients = gradients
        for p in self.params:
            p.data = laid_out(p.data, weights)

    def _step(self, gs, loss):
        for p, g in zip(self.params, gs):
            p.grad = laid_out(g, self.gradients)
        super()._step(gs, loss)


def random_case(name, number):
    """(what a run is made with, its dtype, how its gradients are drawn)."""
    draw = random.Random(f"{name} {number}")
    layouts = ("plain", "transposed", "sliced", "channels_last")
    dtype = draw.choice((torch.float64, torch.float32, torch.bfloat16, torch.float16))
    options = {} if dtype.itemsize == 2 else draw.choice([{}, *oracles.load(name).CASES])
    shapes = [tuple(draw.randint(0, 7) for _ in range(draw.randint(0, 5))) for _ in range(draw.randint(1, 2))]
    how = {"scale": draw.choice((1e-3, 0.1, 1.0)), "zeros": draw.choice((0.0, 0.1)), "weight_decay": 0.01}
    made = {"shapes": shapes, "weights": draw.choice(layouts), "gradients": draw.choice(layouts), "seed": number}
    return {**made, **options}, dtype, how


def rounded_once(run, dtype):
    """Whether low-precision weights are the oracle's up to one rounding, that of numbers below fp16's range too."""
    unit, least = test_oracles.UNIT[dtype], 2.0**-25 if dtype == torch.float16 else 0.0
    size = max(x.abs().max().item() for x in run.x if x.numel())
    pairs = zip(run.weights(), run.x)
    return all(bool(((p - x).abs() <= unit * x.abs() + least + test_oracles.BAR * size).all()) for p, x in pairs)


def problem(name, number):
    """What is wrong with a random case; empty if it follows the oracle."""
    made, dtype, how = random_case(name, number)
    narrow = dtype.itemsize == 2
    run = Strided(name, dtype=dtype, follow=narrow, size=1e-2 if narrow else 1.0, **made)
    if all(not x.numel() for x in run.x):
        run.step(**how)
        return ""
    for _ in range(4):
        run.step(**how)
        if narrow and not rounded_once(run, dtype):
            return f"{number}: {made} {dtype} {how}"
    bar = test_oracles.exact(name) if dtype == torch.float64 else test_oracles.bar(name)
    return "" if narrow or run.error() < bar else f"{number}: {made} {dtype} {how}: {run.error()}"


def check_cases(name, numbers):
    found = [text for text in (problem(name, number) for number in numbers) if text]
    assert not found, "\n".join(found)


def test_random_tensors_follow_the_oracle(name):
    check_cases(name, range(SAMPLE))


@pytest.mark.slow
def test_thousands_of_random_tensors_follow_the_oracle(name):
    check_cases(name, range(SAMPLE, CASES))
