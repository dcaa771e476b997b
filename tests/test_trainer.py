# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every name as a Trainer choice: arguments, groups, schedules, checkpoints, logs."""

import json
import pickle
import re
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_optim
from hf_optim.trainer.register import resolve


@pytest.fixture(autouse=True, scope="module")
def registered():
    hf_optim.register()


def kwargs_of(name, optim_args=None, **fields):
    return resolve(hf_optim.info(name), tiny.arguments(optim=name, optim_args=optim_args, **fields), None)


# ---- the name ----


def test_name_is_a_choice_everywhere(name, tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    assert name in next(action.choices for action in parser._actions if action.dest == "optim")
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name])
    assert args.optim == name and args.optim is OptimizerNames[name.upper()]
    (tmp_path / "run.json").write_text(json.dumps({"output_dir": str(tmp_path), "optim": name}))
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}\noptim: {name}\n")
    assert parser.parse_json_file(tmp_path / "run.json")[0].optim == name
    assert parser.parse_yaml_file(tmp_path / "run.yaml")[0].optim == name
    assert args.to_dict()["optim"] == name
    assert pickle.loads(pickle.dumps(args)).optim is args.optim


def test_registering_twice_changes_nothing():
    before = list(OptimizerNames)
    hf_optim.register()
    assert list(OptimizerNames) == before and len({m.value for m in before}) == len(before)


def test_unknown_name_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'adalo'"):
        TrainingArguments(str(tmp_path), optim="adallo")


def test_a_name_of_transformers_stays_theirs(monkeypatch):
    from hf_optim.trainer import register

    info = hf_optim.OptimInfo("adamw_torch", hf_optim.AdamW, "clash", "1711.05101")
    register._add_name("adamw_torch", info)
    try:
        assert resolve_optim("adamw_torch")[0] is torch.optim.AdamW
        assert resolve_optim("hfo_adamw_torch")[0] is hf_optim.AdamW
    finally:
        register.HANDLED.pop("hfo_adamw_torch")


def resolve_optim(name, **fields):
    return Trainer.get_optimizer_cls_and_kwargs(tiny.arguments(optim=name, **fields))


def test_replaced_built_in_name():
    code = (
        "import hf_optim; hf_optim.register(replace=('adafactor',))\n"
        "from transformers import Trainer, TrainingArguments\n"
        "args = TrainingArguments('/tmp/x', optim='adafactor', optim_args='clip_threshold=2', use_cpu=True)\n"
        "cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)\n"
        "assert cls is hf_optim.Adafactor and kwargs['clip_threshold'] == 2.0, (cls, kwargs)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=None)
    from transformers.optimization import Adafactor

    assert resolve_optim("adafactor")[0] is Adafactor  # nothing is replaced unasked
    with pytest.raises(ValueError, match="corrected version"):
        hf_optim.register(replace=("sgd",))


# ---- options ----


def test_without_a_model_there_are_no_groups(name):
    cls, kwargs = kwargs_of(name)
    assert cls is hf_optim.info(name).cls and "params" not in kwargs
    cls([torch.nn.Parameter(torch.zeros(2, 2))], **kwargs)


def test_precedence():
    beta1 = {k: v for k, v in kwargs_of("adamw")[1].items() if k == "beta1"}
    assert beta1 == {}  # the class default stands
    assert kwargs_of("adamw", adam_beta1=0.7)[1]["beta1"] == 0.7
    assert kwargs_of("adamw", "beta1=0.6", adam_beta1=0.7)[1]["beta1"] == 0.6
    preset = hf_optim.OptimInfo("x", hf_optim.AdamW, "", "", preset={"beta1": 0.5}, from_args={"beta1": "adam_beta1"})
    assert resolve(preset, tiny.arguments(), None)[1]["beta1"] == 0.5
    assert resolve(preset, tiny.arguments(adam_beta1=0.7), None)[1]["beta1"] == 0.7


@pytest.mark.parametrize(
    ("optim", "text", "error", "message"),
    [
        ("adamw", "lr=0.1", ValueError, "--learning_rate"),
        ("adamw", "weight_decay=0.1", ValueError, "--weight_decay"),
        ("adamw", "beta_1=0.9", TypeError, "did you mean 'beta1'"),
        ("adamw", "beta1=1.2", ValueError, r"`beta1` must be a float in \[0, 1\), got 1.2"),
        ("adamw", "beta1=high", ValueError, "`beta1` must be a float"),
        ("adamw", "beta1", ValueError, "'beta1' is not 'name=value'"),
        ("adalo", "denominator=atan2", ValueError, "it has no ratio"),
        ("amos", "decay=cautious", ValueError, "inside its own rule"),
        ("adafactor_corrected", "cautious=true", ValueError, "it needs `beta1`"),
    ],
)
def test_bad_optim_args_are_refused_by_trainer(optim, text, error, message):
    run = tiny.trainer(optim=optim, optim_args=text)
    with pytest.raises(error, match=message):
        run.train()


def test_optim_args_are_typed():
    text = "relative_step=true, scale_parameter=yes, beta1=none, clip_threshold=2, eps1=1e-20, decay_rate=0.7,"
    found = kwargs_of("adafactor_corrected", text)[1]
    wanted = {"relative_step": True, "scale_parameter": True, "beta1": None, "clip_threshold": 2.0}
    assert {**found, **wanted, "eps1": 1e-20, "decay_rate": 0.7} == found
    assert kwargs_of("adalo", '{"kappa": 2, "mode": "loss"}')[1]["mode"] == "loss"


def test_one_warning_where_the_default_learning_rate_cannot_train(caplog):
    for name, warns in {"sm3": True, "amos": True, "nsgda": True, "adamw": False, "adalo": False}.items():
        caplog.clear()
        resolve(hf_optim.info(name), tiny.arguments(optim=name, learning_rate=5e-5), None)
        assert ("hardly trains" in caplog.text) is warns, name
    caplog.clear()
    resolve(hf_optim.info("sm3"), tiny.arguments(optim="sm3", learning_rate=6e-5), None)
    assert not caplog.text  # chosen by the user


# ---- kinds of weights ----


def rules(run):
    """{parameter name: rule} of a Muon run."""
    run.create_optimizer()
    of = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in run.model.named_parameters()}


def test_muon_orthogonalises_hidden_matrices_only():
    groups = rules(tiny.trainer(optim="muon", learning_rate=1e-3, optim_args="adamw_lr=3e-4", weight_decay=0.1))
    for name, group in groups.items():
        hidden = ".h." in name and name.endswith(".weight") and ".ln_" not in name
        assert group["rule"] == ("muon" if hidden else "adamw"), name
        assert group["lr"] == (1e-3 if hidden else 3e-4), name
    assert any(g["weight_decay"] == 0.1 for g in groups.values())
    assert any(g["weight_decay"] == 0.0 for g in groups.values())


@pytest.mark.parametrize(
    ("targets", "hit"),
    [(["mlp.c_fc"], "mlp.c_fc"), (r".*attn\.c_proj", "attn.c_proj"), ("all-linear", ".c_")],
)
def test_optim_target_modules_choose_what_muon_gets(targets, hit):
    groups = rules(tiny.trainer(optim="muon", optim_target_modules=targets))
    got = {name for name, group in groups.items() if group["rule"] == "muon"}
    assert got == {n for n in groups if hit in n and n.endswith(".weight")} and got


def test_optim_target_modules_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="`optim_target_modules` matches no module"):
        tiny.trainer(optim="muon", optim_target_modules=["mlp.cfc"]).create_optimizer()


def test_optim_target_modules_that_nothing_looks_at(caplog):
    tiny.trainer(optim="adamw", optim_target_modules="all-linear").create_optimizer()
    assert "`optim_target_modules` has no effect with adamw" in caplog.text


@pytest.mark.parametrize(
    ("flag", "spared"), [("agc", "wte"), ("centralize", "wte"), ("decay=cpr", "wte"), ("centralize", "wpe")]
)
def test_flags_spare_the_weights_they_are_not_made_for(flag, spared):
    name, _, value = flag.partition("=")
    run = tiny.trainer(optim="adamw", optim_args=f"{name}={value or 'true'}")
    on = {n for n, group in rules(run).items() if group[name] == (value or True)}
    assert on and not any(spared in n for n in on)  # wte is the output layer, too


# ---- runs ----


def test_run_keeps_groups_schedule_and_logs(second_name):
    rate = 0.0 if hf_optim.info(second_name).preset.get("decay") == "cpr" else 0.1
    run = tiny.trainer(optim=second_name, weight_decay=rate, lr_scheduler_type="linear", warmup_steps=2)
    before = tiny.weights(run)
    run.train()
    groups = run.optimizer.param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n: id(p) in decayed for n, p in run.model.named_parameters()}
    wanted = run.get_decay_parameter_names(run.model)
    assert {n for n, d in names.items() if d} == (set(wanted) & set(names) if rate else set())
    assert sum(len(g["params"]) for g in groups) == len(names)
    logs = [entry for entry in run.state.log_history if "learning_rate" in entry]
    assert [round(entry["learning_rate"], 6) for entry in logs] == [0.0, 0.005, 0.01, 0.005]
    used = [entry["optim/effective_lr"] for entry in logs]
    assert all(u > 0 for u in used) if second_name == "adalo" else used == pytest.approx([0.0, 0.005, 0.01, 0.005])
    assert any(not torch.equal(a, b) for a, b in zip(before, tiny.weights(run)))


# every fourth name in each dtype; `pytest -m slow` takes the rest
CELLS = [(n, bf16, (i + bf16) % 4 > 0) for i, n in enumerate(hf_optim.list_optimizers()) for bf16 in (False, True)]


@pytest.mark.parametrize("which, bf16", [pytest.param(n, b, marks=[pytest.mark.slow] * s) for n, b, s in CELLS])
def test_resume_is_bit_identical(which, bf16):
    def make(**options):
        net = tiny.model(dropout=0.1)
        net = net.bfloat16() if bf16 else net
        return tiny.trainer(net=net, optim=which, max_steps=6, gradient_accumulation_steps=2, **options)

    whole = make(save_strategy="steps", save_steps=3)
    whole.train()
    again = make(save_strategy="no")
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    for a, b in zip(tiny.weights(whole), tiny.weights(again)):
        assert torch.equal(a, b)
    logged = [[e["loss"] for e in r.state.log_history if "loss" in e] for r in (whole, again)]
    assert logged[0] == logged[1]


def test_amos_learns_the_kind_of_each_module():
    run = tiny.trainer(optim="amos", optim_args="etas=lm_head|wte:0.3;ln_f:2")
    optimizer = run.create_optimizer()
    by_name = {n: p for n, p in run.model.named_parameters()}
    eta = {id(p): g["eta"] for g in optimizer.param_groups for p in g["params"]}
    axis = {id(p): g["output_axis"] for g in optimizer.param_groups for p in g["params"]}
    assert eta[id(by_name["transformer.wte.weight"])] == 0.3
    assert eta[id(by_name["transformer.ln_f.weight"])] == 2.0
    assert eta[id(by_name["transformer.h.0.ln_1.weight"])] == 1.0
    assert eta[id(by_name["transformer.wpe.weight"])] == (2 / 16) ** 0.5
    assert axis[id(by_name["transformer.h.0.attn.c_attn.weight"])] == 1  # Conv1D is (in, out)


def test_model_card_tells_the_betas_that_were_used(tmp_path):
    run = tiny.trainer(optim="adamw", adam_beta1=0.7, adam_epsilon=1e-7)
    run.train()
    run.create_model_card(model_name="x")
    with open(f"{run.args.output_dir}/README.md") as file:
        card = file.read()
    assert re.search(r"ADAMW.*betas=\(0\.7,\s?0\.999\) and epsilon=1e-07", card), card
    assert run.optimizer.param_groups[0]["beta1"] == 0.7 and run.optimizer.param_groups[0]["eps"] == 1e-7


def test_training_args_saved_with_our_name_need_the_package(tmp_path):
    torch.save(tiny.arguments(optim="adalo"), tmp_path / "training_args.bin")
    code = f"import torch, transformers; torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False)"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.returncode and "adalo is not a valid OptimizerNames" in alone.stderr
    subprocess.run([sys.executable, "-c", f"import hf_optim; hf_optim.register(); {code}"], check=True)


# ---- third parties ----

PLUGIN = '''
from hf_optim import Optimizer, OptimInfo, hp


class SignDescent(Optimizer):
    """Step by the sign of the gradient."""

    sharpness: float = hp(1.0, "factor of the step", gt=0)
    elementwise = True

    @staticmethod
    def init(p, h):
        return {}

    @staticmethod
    def update(g, p, s, h):
        return h.sharpness * g.sign()


info = OptimInfo("sign_descent", SignDescent, "a toy", "https://example.org", lr=(1e-4, 1e-1))
'''


def test_third_party_optimizer_by_register_and_by_entry_point(tmp_path):
    (tmp_path / "toyopt.py").write_text(PLUGIN)
    dist = tmp_path / "toyopt-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: toyopt\nVersion: 1.0\n")
    run = (
        "import sys; sys.path[:0] = [{path!r}, {tests!r}]\n"
        "import torch, hf_optim\n"
        "{register}\n"
        "import tiny\n"
        "run = tiny.trainer(optim='sign_descent', optim_args='sharpness=2', max_steps=2,\n"
        "                   lr_scheduler_type='constant')\n"
        "before = tiny.weights(run); run.train()\n"
        "moved = max(float((a - b).abs().max()) for a, b in zip(before, tiny.weights(run)))\n"
        "assert abs(moved - 2 * 2 * 1e-2) < 1e-6, moved\n"
    )
    tests = str(__file__).rsplit("/", 1)[0]
    explicit = run.format(path=str(tmp_path), tests=tests, register="import toyopt; hf_optim.register(toyopt.info)")
    subprocess.run([sys.executable, "-c", explicit], check=True)
    (dist / "entry_points.txt").write_text("[hf_optim.optimizers]\nsign_descent = toyopt:info\n")
    found = run.format(path=str(tmp_path), tests=tests, register="hf_optim.register()")
    subprocess.run([sys.executable, "-c", found], check=True)


def test_broken_plugin_is_left_out_with_a_warning(monkeypatch, caplog):
    from hf_optim import registry

    class Broken:
        name, value = "broken", "nowhere:info"

        def load(self):
            raise ImportError("no module named 'nowhere'")

    monkeypatch.setattr(registry, "_scanned", False)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Broken()])
    assert "adalo" in registry.list_optimizers()
    assert "'broken'" in caplog.text and "nowhere" in caplog.text


@pytest.mark.parametrize("options", [{"optim": "muon"}, {"optim": "adamw", "optim_args": "agc=true"}])
def test_a_subclass_says_what_decays(options):
    class Mine(hf_optim.LossAwareTrainer):
        def get_decay_parameter_names(self, model):
            return ["transformer.h.0.mlp.c_fc.weight"]

    run = tiny.trainer(Mine, weight_decay=0.1, **options)
    decayed = [p for g in run.create_optimizer().param_groups if g["weight_decay"] for p in g["params"]]
    assert [id(p) for p in decayed] == [id(run.model.get_parameter("transformer.h.0.mlp.c_fc.weight"))]


def test_optim_args_may_be_a_mapping():
    args = tiny.arguments(optim="adamw", max_steps=1)
    args.optim_args = {"beta1": 0.8, "cautious": "true"}
    group = hf_optim.LossAwareTrainer(tiny.model(), args, train_dataset=tiny.data()).create_optimizer().param_groups[0]
    assert (group["beta1"], group["cautious"]) == (0.8, True)
