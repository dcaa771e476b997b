# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Options are checked where they are given: every optimizer, every option, every way to get it wrong."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_params
from engine import build, moments, reloaded, settings_of_flags
from hypothesis import given
from hypothesis import strategies as st

import hf_optim
from hf_optim.core import FLAGS, hp, parse_options
from hf_optim.core.flags import techniques
from hf_optim.core.options import by_pattern
from hf_optim.optim_args import split_optim_args


NAN, INF = float("nan"), float("inf")
HUGE = 10**400  # an int that no float can hold


def context(name, key):
    """Options without which `key` could have no effect, and would be refused for that."""
    needed = settings_of_flags().get(key, {})
    known = hf_optim.info(name).options  # nsgda has an `eps` of its own, and no flag `denominator`
    return {k: v for k, v in {**moments(name), **needed}.items() if k != key and k in known}


def outside(option):
    """Numbers just outside the range of an option, on each side that has an end."""
    kind, found = option.type, []
    step = (lambda x, to: int(x + math.copysign(1, to))) if kind is int else math.nextafter
    if option.ge is not None:
        found += [step(option.ge, -INF), kind(option.ge - 1)]
    if option.gt is not None:
        found += [kind(option.gt), kind(option.gt - 1)]
    if option.le is not None:
        found += [step(option.le, INF), kind(option.le + 1)]
    if option.lt is not None:
        found += [kind(option.lt), kind(option.lt + 1)]
    return found


def inside(option):
    """A few values that an option accepts, its ends among them."""
    if option.choices:
        return list(option.choices)
    if option.type in (bool, str):
        return [True, False] if option.type is bool else ["weight:0.5"]
    low = option.ge if option.ge is not None else option.gt if option.gt is not None else -3
    high = option.le if option.le is not None else option.lt if option.lt is not None else low + 4
    ends = [x for x in (option.ge, option.le) if x is not None]
    return [option.type(x) for x in ends] + ([(low + high) / 2] if option.type is float else [int(low) + 1])


def wrong(option):
    """Values of the wrong type or not finite, for an option of any type."""
    values = [(0.5,), [0.5], {"a": 1}, object(), NAN, INF, -INF, torch.tensor([0.5, 0.5]), torch.empty(0), 1j]
    values += [torch.tensor(NAN), np.float64("nan"), np.array([0.5, 0.5]), b"x"]
    values += [] if option.optional else [None]
    values += [] if option.type is str else ["0.5", "abc", ""]
    values += [] if option.type is bool else [True, torch.tensor(True), np.bool_(False)]
    values += [] if option.type is float else [0.5, np.float32(0.5), torch.tensor(0.5)]
    values += [0, 1, np.int64(1)] if option.type in (bool, str) else [HUGE] if option.type is float else []
    values += ["nope", "", option.choices[0].upper(), (option.choices[0],)] if option.choices else []
    return values


def refused(excinfo, option, value):
    text = str(excinfo.value)
    assert f"`{option.name}`" in text and option.range in text, text
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        assert repr(value) in text


def test_the_values_of_these_tests_reach_every_end():
    option = hf_optim.info("adamw").options["beta1"]
    assert outside(option) == [math.nextafter(0, -1), -1, 1, 2] and inside(option) == [0, 0.5]
    assert outside(hf_optim.info("adamw").options["lookahead_k"]) == [0, 0]


def test_bad_values_are_refused_at_construction_and_in_a_group(class_name):
    optimizer, _ = build(class_name, [(2, 3)])
    owner = type(optimizer)
    for key, option in owner.options().items():
        for value in wrong(option) + outside(option):
            p = make_params([(3,)])
            others = context(class_name, key)
            if key != "lr" or value is not None:  # the constructor's way to say "the default of the class"
                with pytest.raises((ValueError, TypeError)) as at_construction:
                    owner(p, **{**others, key: value})
                refused(at_construction, option, value)
                assert owner.__name__ in str(at_construction.value)
            with pytest.raises((ValueError, TypeError)) as in_first_group:
                owner([{"params": p, **others, key: value}])
            refused(in_first_group, option, value)
            with pytest.raises((ValueError, TypeError)) as in_added_group:
                optimizer.add_param_group({"params": p, **others, key: value})
            refused(in_added_group, option, value)
            assert len(optimizer.param_groups) == 1


def test_out_of_range_is_a_value_error_and_a_wrong_type_a_type_error(class_name):
    optimizer, params = build(class_name, [(2,)])
    for key, option in optimizer.options().items():
        for value in outside(option):
            with pytest.raises(ValueError):
                type(optimizer)(params, **{**context(class_name, key), key: value})
        for value in [(0.5,), object()]:
            with pytest.raises(TypeError):
                type(optimizer)(params, **{**context(class_name, key), key: value})


def test_good_values_are_stored_as_plain_python(class_name):
    cls = hf_optim.info(class_name).cls
    for key, option in cls.options().items():
        for value in inside(option):
            forms = [value]
            if option.type in (int, float, bool):
                forms += [np.array(value)[()], np.array([value]), torch.tensor(value), torch.tensor([value])]
            for given_as in forms:
                params = make_params([(2, 3)])
                try:
                    optimizer = cls([{"params": params, **context(class_name, key), key: given_as}])
                except ValueError as error:
                    assert "cannot act" in str(error), error  # refused beside the others, not for its value
                    continue
                stored = optimizer.param_groups[0][key]
                assert type(stored) is option.type, (key, given_as)
                assert stored == pytest.approx(value, rel=1e-6) if option.type is float else stored == value
                reloaded(optimizer.state_dict())
        if option.optional:
            others = {
                k: v
                for k, v in context(class_name, key).items()
                if not (class_name == "spectral_adamw" and k == "trust_ratio")
            }
            assert not others or cls(make_params([(2,)]), **others, **{key: None}).param_groups[0][key] is None


def test_state_dtype_may_be_a_dtype(class_name):
    optimizer, _ = build(class_name, [(2,)], state_dtype=torch.bfloat16)
    assert optimizer.param_groups[0]["state_dtype"] == "bfloat16"
    with pytest.raises(
        ValueError, match="`state_dtype` must be one of 'float32', 'bfloat16', 'int8', got torch.float16"
    ):
        build(class_name, [(2,)], state_dtype=torch.float16)


def test_unknown_options_are_refused_with_the_nearest_name_and_the_list(class_name):
    optimizer, params = build(class_name, [(2,)])
    cls, table = type(optimizer), optimizer.options()
    typos = [key[:-2] + key[-1] + key[-2] for key in table if len(key) > 4 and key[-1] != key[-2]]
    for typo in [*typos, "params_", "betas", "step", "optimizer"]:
        if typo in table:
            continue
        with pytest.raises(TypeError) as at_construction:
            cls(params, **{typo: 0.5})
        with pytest.raises(TypeError) as by_name:
            hf_optim.create(class_name, params, **{typo: 0.5})
        for text in (str(at_construction.value), str(by_name.value)):
            assert f"`{typo}`" in text and cls.__name__ in text and all(key in text for key in table)
            if typo in typos:
                assert "did you mean" in text
    for typo in typos:
        if typo not in table:
            with pytest.raises(TypeError, match=f"`{typo}`"):
                cls([{"params": params, typo: 0.5}])
            with pytest.raises(TypeError, match=f"`{typo}`"):
                optimizer.add_param_group({"params": make_params([(2,)]), typo: 0.5})
    assert len(optimizer.param_groups) == 1


def test_unknown_names_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'; did you mean 'adamw'"):
        hf_optim.create("adamv", make_params([(2,)]))
    with pytest.raises(ValueError, match="unknown optimizer 'qqqq' Known: .*adamw"):
        hf_optim.info("qqqq")


def test_settings_of_a_flag_that_is_off_are_refused(class_name):
    cls = hf_optim.info(class_name).cls
    tried = 0
    for flag in cls.flags():
        members = techniques(flag, cls)
        for value, member in members.items():
            for key, option in member.options.items():
                default = cls.options()[flag].default
                off = {flag: next(v for v in members if v != value)} if default == value else {}
                tried += 1
                with pytest.raises(ValueError) as excinfo:
                    cls(make_params([(2,)]), **moments(class_name), **off, **{key: inside(option)[-1]})
                text = str(excinfo.value)
                if f"`{key}" not in text or "cannot act" not in text:  # refused with the flag on, too
                    assert f"`{key}` has no effect" in text and f"`{flag}={value}`" in text, text
    assert tried >= 2  # lookahead alone has two


def test_a_setting_of_a_flag_counts_in_a_group_too(class_name):
    with pytest.raises(ValueError, match="`lookahead_k` has no effect with `lookahead=False`"):
        hf_optim.info(class_name).cls([{"params": make_params([(2,)]), "lookahead_k": 3}])
    on = hf_optim.info(class_name).cls([{"params": make_params([(2,)]), "lookahead_k": 3, "lookahead": True}])
    assert on.param_groups[0]["lookahead_k"] == 3


def test_flags_that_cannot_act_are_refused_naming_both_sides(class_name):
    cls = hf_optim.info(class_name).cls
    for flag in FLAGS:
        for value in set(FLAGS[flag]) - set(techniques(flag, cls)):
            with pytest.raises(ValueError) as excinfo:
                cls(make_params([(2,)]), **{flag: value})
            assert f"`{flag}={value}` cannot act on {cls.__name__}: " in str(excinfo.value)


@pytest.mark.parametrize(
    "optimizer, options",
    [
        ("sm3", {"cautious": True}),
        ("adafactor_corrected", {"cautious": True}),
        ("nsgda", {"cautious": True, "momentum": 0.0}),
        ("smmf", {"cautious": True, "beta1": None}),
        ("amos", {"cautious": True}),
        ("amos", {"decay": "cautious"}),
        ("amos", {"etas": "weight:0.5"}),
        ("sm3", {"denominator": "atan2"}),
        ("adamw", {"denominator": "atan2", "eps": 1e-6}),
        ("adamw", {"atan2_a": 1.0}),
        ("adamw", {"cautious_floor": 0.1}),
    ],
)
def test_combinations_without_effect(optimizer, options):
    cls = hf_optim.info(optimizer).cls
    with pytest.raises(ValueError) as excinfo:
        cls(make_params([(2,)]), **options)
    assert cls.__name__ in str(excinfo.value) and any(f"`{key}" in str(excinfo.value) for key in options)


def test_a_group_overrides_the_optimizer(name):
    a, b = make_params([(2, 3), (4,)])
    groups = [{"params": [a], "lr": 0.25, "weight_decay": 0.5, "lookahead": True, "decay": "coupled"}, {"params": [b]}]
    if "decay" not in hf_optim.info(name).flags:
        del groups[0]["decay"]
    optimizer = hf_optim.create(name, groups, lr=0.125, seed=7, lookahead=False)
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], first["lookahead"], first["seed"]) == (0.25, 0.5, True, 7)
    assert (second["lr"], second["weight_decay"], second["lookahead"], second["seed"]) == (0.125, 0.0, False, 7)


def test_what_the_constructor_got_counts_in_a_group_that_joins_later(name):
    optimizer, _ = build(name, [(2,)], lr=0.125, lookahead=True, lookahead_k=3)
    optimizer.add_param_group({"params": make_params([(3,)]), "seed": 5})
    group = optimizer.param_groups[1]
    assert (group["lr"], group["lookahead"], group["lookahead_k"], group["seed"]) == (0.125, True, 3, 5)


def test_a_group_is_left_as_it_was_given(name):
    group = {"params": make_params([(2,)]), "lr": 0.5}
    hf_optim.create(name, [group], seed=3)
    assert set(group) == {"params", "lr"}


@pytest.mark.parametrize("lr", [torch.tensor(0.25), torch.tensor([0.25]), np.float32(0.25), np.float64(0.25)])
def test_the_learning_rate_is_stored_as_a_float(name, lr):
    for optimizer in (
        hf_optim.create(name, make_params([(2,)]), lr=lr),
        hf_optim.create(name, [{"params": make_params([(2,)]), "lr": lr}]),
        hf_optim.info(name).cls(make_params([(2,)]), lr),
    ):
        assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_parameters_that_are_not_real_floating_point_are_refused(name, dtype):
    bad = torch.nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=dtype.is_complex)
    cls = hf_optim.info(name).cls
    with pytest.raises(ValueError, match=f"{cls.__name__} needs real floating-point parameters, got {dtype}"):
        cls([bad])
    optimizer, _ = build(name, [(2,)])
    with pytest.raises(ValueError, match="real floating-point"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def test_what_torch_refuses_is_refused(name):
    cls = hf_optim.info(name).cls
    (p,) = make_params([(2,)])
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(TypeError, match="iterable"):
        cls(p)
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="non-leaf"):
        cls([p * 2])
    with pytest.raises(TypeError, match="dict"):
        build(name, [(2,)])[0].add_param_group([p])


# ---- declaring options ---------------------------------------------------------------------------------------------


def test_ranges_read_as_intervals():
    ranges = {key: option.range for key, option in hf_optim.info("adamw").options.items()}
    assert ranges["beta1"] == "a float in [0, 1)" and ranges["atan2_a"] == "a float in (0, inf)"
    assert ranges["lookahead_k"] == "an int in [1, inf)" and ranges["cautious"] == "True or False"
    assert ranges["backend"] == "one of 'auto', 'loop', 'fused'"
    assert hf_optim.info("smmf").options["beta1"].range == "a float in [0, 1) or None"
    assert hp(0.0, "free").range == "a float" and hp(0.0, "", gt=0, le=1).range == "a float in (0, 1]"


def test_every_option_is_documented_and_its_default_is_legal(class_name):
    info = hf_optim.info(class_name)
    for key, option in info.options.items():
        assert option.name == key and option.doc and not option.doc.endswith(".")
        assert option.check("x", option.default) == option.default
    assert info.cls.resolve(dict(info.preset)) == info.defaults


def test_by_pattern():
    assert by_pattern("a:1;b$:2", "xa", None) == 1 and by_pattern("a:1;b$:2", "cb", None) == 2
    assert by_pattern("a:1", "b", None) is None and by_pattern("", "b", 3.0) == 3
    assert by_pattern("h:0:3", "h:0", None) == 3  # the last colon separates
    option = hp("", "numbers by name", patterns=True)
    for bad in ("a", "a:", ":1", "a:x", "(:1"):
        with pytest.raises(ValueError, match=r"`.*` must be a string `pattern:number;pattern:number`, got '"):
            replace(option, name="sizes", type=str).check("Rule", bad)


# ---- --optim_args --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, {}),
        ("", {}),
        ("  ", {}),
        ("a=1", {"a": "1"}),
        ("a=1,", {"a": "1"}),
        (" a = 1 , b=two ", {"a": "1", "b": "two"}),
        ("a=(1,2),b=[3,4],c={5,6}", {"a": "(1,2)", "b": "[3,4]", "c": "{5,6}"}),
        ("a='1,2',b=\"3,4\"", {"a": "1,2", "b": "3,4"}),
        ("a='x)',b=2", {"a": "x)", "b": "2"}),
        ("a='it\"s',b=2", {"a": 'it"s', "b": "2"}),
        ("etas=w:1;b:2,x=''", {"etas": "w:1;b:2", "x": ""}),
        ("a=b=c", {"a": "b=c"}),
        ('{"a": 1, "b": "x,y", "c": null, "d": true, "e": 0.5}', {"a": 1, "b": "x,y", "c": None, "d": True, "e": 0.5}),
        (' {"a": [1, 2]} ', {"a": [1, 2]}),
    ],
)
def test_split_optim_args(text, expected):
    assert split_optim_args(text) == expected


@pytest.mark.parametrize(
    "text, named",
    [
        ("a", "'a'"),
        ("a=", "'a='"),
        ("=1", "'=1'"),
        ("a=1,b", "'b'"),
        ("a=1,,b=2", "''"),
        (",a=1", "''"),
        (",", "''"),
        ("a=1,b 2", "'b 2'"),
        ("a=1,a=2", "`a` twice"),
        ("a=1, a =2", "`a` twice"),
        ('{"a": 1, "a": 2}', "`a` twice"),
        ('{"a": 1', "JSON"),
        ('{"a": 1} b=2', "JSON"),
        ("{a=1}", "JSON"),
        ('a="x,b=2', '"a=\\"x,b=2'),  # an unclosed quote must not swallow the options after it
        ("a=(1,b=2", "'a=(1,b=2'"),
        ("a=1),b=2", "'a=1)"),
    ],
)
def test_split_optim_args_names_what_it_cannot_read(text, named):
    with pytest.raises(ValueError) as excinfo:
        split_optim_args(text)
    assert named.replace('\\"', '"').strip('"') in str(excinfo.value)


names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
plain = st.text("abc019.-:;_ ", min_size=1, max_size=8).filter(lambda s: s.strip() == s)
quoted = st.tuples(st.text("ab,=()[]{} ", max_size=8), st.sampled_from("'\""))
nested = st.lists(plain, min_size=1, max_size=3).map(",".join)


@given(st.dictionaries(names, st.one_of(plain, quoted, nested), max_size=6), st.booleans())
def test_split_optim_args_finds_every_pair(pairs, comma):
    parts, expected = [], {}
    for key, value in pairs.items():
        if isinstance(value, tuple):
            text, quote = value
            parts.append(f"{key}={quote}{text}{quote}")
            expected[key] = text
        else:
            value = f"({value})" if "," in value else value
            parts.append(f"{key}={value}")
            expected[key] = value
    text = ",".join(parts) + ("," if comma and parts else "")
    assert split_optim_args(text) == expected


@given(st.dictionaries(names, st.one_of(st.booleans(), st.none(), st.integers(), st.text(max_size=8)), max_size=5))
def test_split_optim_args_reads_json(pairs):
    assert split_optim_args(json.dumps(pairs)) == pairs


@given(st.text("ab=,'\"()[]{}: 1", max_size=14))
def test_split_optim_args_reads_or_refuses(text):
    try:
        found = split_optim_args(text)
    except ValueError as error:
        assert "optim_args" in str(error)
        return
    assert isinstance(found, dict) and all(isinstance(key, str) and key.strip() == key for key in found)
    if not text.strip().startswith("{"):  # nothing is dropped: every letter and digit of the text is in the answer
        kept = "".join(key + value for key, value in found.items())
        assert [text.count(c) for c in "ab1"] == [kept.count(c) for c in "ab1"]


# ---- values from a command line ------------------------------------------------------------------------------------


def options_of(name):
    return hf_optim.info(name).options


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("beta1", "0.95", 0.95),
        ("beta1", " none ", None),
        ("beta1", "Null", None),
        ("beta1", None, None),
        ("cautious", "true", True),
        ("cautious", "Yes", True),
        ("cautious", "1", True),
        ("cautious", "FALSE", False),
        ("cautious", "no", False),
        ("cautious", "0", False),
        ("cautious", True, True),
        ("lookahead_k", "7", 7),
        ("lookahead_k", 7, 7),
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("backend", " loop ", "loop"),
        ("eps1", "1e-30", 1e-30),
    ],
)
def test_parse_options_reads_text(key, text, value):
    table = options_of("smmf") | options_of("adafactor_corrected")
    parsed = parse_options("SMMF", {key: text}, table)[key]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "key, text",
    [
        ("beta1", "abc"),
        ("beta1", ""),
        ("beta1", "nan"),
        ("beta1", "1.0"),
        ("beta1", "(0.9,0.99)"),
        ("lr", "none"),
        ("lr", "inf"),
        ("lr", "-1"),
        ("cautious", "maybe"),
        ("cautious", "none"),
        ("lookahead_k", "2.5"),
        ("lookahead_k", "0"),
        ("backend", "cuda"),
        ("lr", "9" * 400),
    ],
)
def test_parse_options_refuses_text_by_name_and_range(key, text):
    table = options_of("smmf")
    with pytest.raises(ValueError) as excinfo:
        parse_options("SMMF", {key: text}, table)
    assert f"SMMF: `{key}` must be {table[key].range}, got " in str(excinfo.value)


def test_parse_options_refuses_unknown_names(class_name):
    info = hf_optim.info(class_name)
    with pytest.raises(TypeError, match="unknown option `wieght_decay`; did you mean 'weight_decay'"):
        parse_options(info.cls.__name__, {"wieght_decay": "0.1"}, info.options)


def test_parse_options_reads_back_every_default(class_name):
    info = hf_optim.info(class_name)
    text = {key: str(value) for key, value in info.defaults.items()}
    assert parse_options(info.cls.__name__, text, info.options) == info.defaults
