# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What cannot be right on a layout is refused, by the command line and by the Trainer; everything else passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from transformers import Trainer
from typer.testing import CliRunner

import hf_optim
from hf_optim.cli.main import app
from hf_optim.core import Flag
from hf_optim.core.flags import FLAGS
from hf_optim.trainer import layout as reader
from hf_optim.verdicts import TITLES, Layout, decide


ROOT = Path(hf_optim.__file__).parent.parent
CONFIGS = ROOT / "configs" / "accelerate"
KINDS = {
    "single": "single",
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero_offload": "zero2",
}
PARTS = ("fsdp1", "zero1", "zero2", "zero3", "tp")
# what looks at no other element than its own: written down once by hand, apart from what the classes declare
ALONE = {
    "adamw", "adalo", "nadamw", "adam_atan2", "softplus_adamw", "cautious_decay_adamw", "stable_decay_sgd", "diffgrad",
    "adamomentum", "lookahead_adamw", "fractional_adamw",
}  # fmt: skip
SUMS = {"stable_decay_adamw"}


@pytest.fixture(autouse=True, scope="module")
def registered():
    hf_optim.register()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # where `deepspeed_config_file` starts


def verdict(name, kind, **options):
    info = hf_optim.info(name)
    return decide(info.cls, {**info.preset, **options}, Layout(kind))


# ---- the decision ----


def test_whole_tensors_are_right_for_all(name):
    for kind in ("single", "ddp"):
        assert str(verdict(name, kind)) == "fine"


def test_shards_that_know_their_tensor_are_right_for_all(name):
    found = verdict(name, "fsdp2")
    assert found.fine and (found.cost == "") is (name in ALONE)
    assert ("a few numbers" in found.cost) is (name in SUMS)


@pytest.mark.parametrize("kind", PARTS)
def test_parts_are_right_for_elementwise_rules_only(name, kind):
    found, info = verdict(name, kind), hf_optim.info(name)
    if kind == "zero3" and name == "adalo":
        assert "one call of `step()`" in found.reason and "ZeRO 1 or 2" in found.reason
    else:
        assert found.fine is (name in ALONE)
    if not found.fine:
        blamed = [info.cls.__name__, *(f"`{k}={v}`" for k, v in info.preset.items())]
        assert any(found.reason.startswith(who) for who in blamed)
        assert TITLES[kind] in found.reason and "FSDP2" in found.reason and "DDP" in found.reason and not found.cost


def test_the_list_above_names_optimizers():
    assert ALONE | SUMS <= set(hf_optim.list_optimizers())


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag in FLAGS for value in FLAGS[flag]])
def test_a_flag_that_looks_further_is_named(flag, value):
    technique: type[Flag] = FLAGS[flag][value]
    options = {flag: value}
    sums = bool(technique.sums(hf_optim.AdamW, None))
    found = verdict("adamw", "zero2", **options)
    assert found.fine is (technique.elementwise and not sums)
    assert found.fine or found.reason.startswith(f"`{flag}={value}`")
    assert str(verdict("adamw", "ddp", **options)) == "fine" and verdict("adamw", "fsdp2", **options).fine


def test_an_option_that_switches_the_preset_off_is_heard():
    assert not verdict("cautious_adamw", "zero2").fine and verdict("cautious_adamw", "zero2", cautious=False).fine
    assert verdict("am_sgd", "ddp", scope="model").fine and not verdict("am_sgd", "zero1", scope="model").fine


def test_options_that_need_whole_weights_under_fsdp2():
    found = verdict("smmf", "fsdp2", matricize="square")
    assert "matricize" in found.reason and not found.cost and verdict("smmf", "fsdp2", matricize="rows").fine


def test_noise_under_tensor_parallelism():
    assert "precision=stochastic" in verdict("adamw", "tp", precision="stochastic").reason
    assert "state_dtype=bfloat16" in verdict("adamw", "tp", state_dtype="bfloat16").reason
    assert verdict("adamw", "tp", precision="kahan").fine and verdict("adamw", "zero2", state_dtype="bfloat16").fine


def test_a_class_that_declares_nothing_is_taken_for_one_that_looks_further():
    class Unknown(hf_optim.Optimizer):
        pass

    class Loss(hf_optim.Optimizer):
        elementwise = needs_loss = True

    assert [decide(Unknown, {}, Layout(kind)).fine for kind in ("ddp", "fsdp2", "fsdp1", "zero1")] == [1, 1, 0, 0]
    assert [decide(Loss, {}, Layout(kind)).fine for kind in ("fsdp1", "zero1", "zero3")] == [1, 1, 0]


def test_unknown_layout():
    with pytest.raises(ValueError, match="unknown layout 'zero4'"):
        Layout("zero4")


def test_show_prints_the_same(name):
    told = hf_optim.info(name).verdicts
    assert told["ddp"] == "fine" and told["fsdp2"] == str(verdict(name, "fsdp2"))
    assert told["fsdp1"] == str(verdict(name, "fsdp1"))
    one, three = str(verdict(name, "zero1")), str(verdict(name, "zero3"))
    assert told["zero"] == (f"fine; at stage 3 {three}" if name == "adalo" else told["zero"])
    assert told["zero"].startswith("no: ") is one.startswith("no: ")
    output = CliRunner().invoke(app, ["show", name]).output
    assert all(f"under {layout}" in output and text in output for layout, text in told.items())


# ---- hf-optim check ----


def check(*words, **files):
    result = CliRunner().invoke(app, ["check", *map(str, words)])
    return result.exit_code, result.output.strip(), result.exception


def write(folder, text, ds=None):
    if ds is not None:
        (folder / "ds.json").write_text(json.dumps(ds))
    path = folder / "accelerate.yaml"
    path.write_text(text.replace("DS_JSON", str(folder / "ds.json")))
    return path


@pytest.mark.parametrize("config", KINDS)
def test_check_on_every_config(config, name):
    kind = KINDS[config]
    code, output, _ = check(name, "--accelerate-config", CONFIGS / f"{config}.yaml")
    expected = decide(hf_optim.info(name).cls, hf_optim.info(name).preset, Layout(kind, offload="offload" in config))
    assert code == (0 if expected.fine else 1) and output == f"{name} under {TITLES[kind]}: {expected}"
    if config == "zero_offload" and expected.fine:
        assert output.endswith(": fine, with a cost: steps on the CPU")
    if config in ("single", "ddp"):
        assert output.endswith(": fine")


def test_check_prints_json():
    code, output, _ = check("lamb", "--accelerate-config", CONFIGS / "zero2.yaml", "--json")
    facts = json.loads(output)
    assert code == 1 and facts == {**facts, "name": "lamb", "layout": "zero2", "fine": False, "cost": ""}
    assert facts["reason"].startswith("`trust_ratio=True`")


def test_check_hears_optim_args():
    where = ("--accelerate-config", CONFIGS / "zero2.yaml")
    assert check("adamw", *where)[0] == 0
    code, output, _ = check("adamw", *where, "--optim-args", "agc=true")
    assert code == 1 and "no: `agc=True`" in output


FSDP = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  "
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  "


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (FSDP + "fsdp_version: 1", "fsdp1"),
        (FSDP + "fsdp_sharding_strategy: FULL_SHARD", "fsdp1"),  # the version is 1 where none is given
        (FSDP + "fsdp_version: 2\nparallelism_config:\n  parallelism_config_tp_size: 2", "tp"),
        (ZERO + "zero_stage: 1", "zero1"),
        (ZERO + "gradient_clipping: 1.0", "zero2"),  # accelerate's stage
        (ZERO + "zero_stage: 0", "ddp"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2", "ddp"),
    ],
)
def test_other_configs(text, kind, tmp_path):
    assert reader.of_accelerate(str(write(tmp_path, text))) == Layout(kind)


@pytest.mark.parametrize("text", ["distributed_type: 'NO'", FSDP + "fsdp_version: 2"])
def test_release_under_fp16_is_refused(text, tmp_path):
    where = ("--accelerate-config", write(tmp_path, text + "\nmixed_precision: fp16"))
    assert check("adamw", *where)[0] == 0
    code, output, _ = check("adamw", *where, "--optim-args", "gradient_release=true")
    assert code == 1 and "the scaler of fp16" in output and "use bf16" in output
    where = ("--accelerate-config", write(tmp_path, text + "\nmixed_precision: bf16"))
    assert check("adamw", *where, "--optim-args", "gradient_release=true")[0] == 0


def test_offload_under_fsdp2_costs_time(tmp_path):
    code, output, _ = check("adamw", "--accelerate-config",
                            write(tmp_path, FSDP + "fsdp_version: 2\n  fsdp_offload_params: true"))  # fmt: skip
    assert code == 0 and output.endswith("fine, with a cost: steps on the CPU")


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
KEY = '`"zero_force_ds_cpu_optimizer": false`'


@pytest.mark.parametrize(
    ("text", "ds", "swapped"),
    [
        (ZERO + "zero_stage: 2\n  offload_optimizer_device: cpu", None, True),
        (ZERO + "zero_stage: 3\n  offload_optimizer_device: nvme", None, True),
        # accelerate does not read this key here
        (ZERO + "zero_stage: 2\n  offload_optimizer_device: cpu\n  zero_force_ds_cpu_optimizer: false", None, True),
        (ZERO + "deepspeed_config_file: DS_JSON", OFFLOAD, True),
        (ZERO + "deepspeed_config_file: DS_JSON", {**OFFLOAD, "zero_force_ds_cpu_optimizer": True}, True),
        (ZERO + "deepspeed_config_file: DS_JSON", {**OFFLOAD, "zero_force_ds_cpu_optimizer": False}, False),
        (ZERO + "zero_stage: 2\n  offload_optimizer_device: none", None, False),
    ],
)
def test_offload_that_swaps_the_optimizer(text, ds, swapped, tmp_path):
    code, output, _ = check("adamw", "--accelerate-config", write(tmp_path, text, ds))
    assert code == swapped and (KEY in output and "DeepSpeedCPUAdam" in output) is swapped


def test_optimizer_section_of_a_deepspeed_file(tmp_path):
    ds = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
    code, output, _ = check(
        "adamw", "--accelerate-config", write(tmp_path, ZERO + "deepspeed_config_file: DS_JSON", ds)
    )
    assert code == 1 and "`optimizer` section" in output and "remove" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("adallo", "--accelerate-config", "configs/accelerate/ddp.yaml"), "did you mean 'adalo'"),
        (("adamw", "--accelerate-config", "nowhere.yaml"), "nowhere.yaml"),
        (("adamw", "--accelerate-config", "configs/accelerate/zero_offload.json"), "distributed_type"),
        (("adamw", "--accelerate-config", "configs/accelerate/ddp.yaml", "--optim-args", "lr=1"), "--learning_rate"),
        (("adamw", "--accelerate-config", "configs/accelerate/ddp.yaml", "--optim-args", "bta1=1"), "beta1"),
        (("adamw", "--accelerate-config", "configs/accelerate/ddp.yaml", "--optim-args", "agc_clip=1"), "agc=True"),
    ],
)
def test_mistakes(words, message):
    _, _, error = check(*words)
    assert type(error).__name__ == "UserError" and message in str(error)  # main() makes it exit code 2


def test_exit_codes_of_the_process():
    def code(*words):
        done = subprocess.run([sys.executable, "-m", "hf_optim.cli.main", "check", *words], capture_output=True)
        return done.returncode, bool(done.stdout), b"Traceback" in done.stderr

    where = ("--accelerate-config", "configs/accelerate/zero2.yaml")
    assert code("adamw", *where) == (0, True, False) and code("sm3", *where) == (1, True, False)
    assert code("adamm", *where) == code("adamw") == (2, False, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a file that `accelerate config` wrote"),
        ("- a list", "not a file that `accelerate config` wrote"),
        ("distributed_type: XLA\nnum_processes: 8", "`distributed_type: XLA` cannot be judged"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_confg: {}", "unknown keys"),
        (FSDP + "fsdp_version: 3", "unknown layout 'fsdp3'"),
        (ZERO + "deepspeed_config_file: nowhere.json", "nowhere.json"),
        ("a: [", "accelerate.yaml: "),
    ],
)
def test_configs_that_cannot_be_read(text, message, tmp_path):
    code, _, error = check("adamw", "--accelerate-config", write(tmp_path, text))
    assert code == 1 and type(error).__name__ == "UserError" and message in str(error)


# ---- the configs themselves ----


@pytest.mark.parametrize("config", KINDS)
def test_accelerate_knows_every_key(config):
    path = str(CONFIGS / f"{config}.yaml")
    known = {action.dest for action in launch_command_parser()._actions}
    parsed = load_config_from_file(path)  # refuses unknown keys, but does not look into sections
    inside = {**parsed.fsdp_config, **parsed.deepspeed_config, **parsed.parallelism_config}
    assert set(inside) <= known
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "train.py"]))
    assert args.num_processes == (1 if config == "single" else 2)
    assert (args.use_fsdp, args.use_deepspeed) == (config == "fsdp2", config.startswith("zero"))
    if config == "fsdp2":
        assert int(args.fsdp_version) == 2 and args.fsdp_reshard_after_forward is True


@pytest.mark.parametrize("config", KINDS)
def test_every_config_has_a_launch_script(config):
    text = (ROOT / "scripts" / f"launch_{config}.sh").read_text()
    words = text.replace("\\\n", " ").split()
    assert f"configs/accelerate/{config}.yaml" in words and "scripts/finetune_clm.py" in words
    assert check(words[words.index("--optim") + 1], "--accelerate-config", CONFIGS / f"{config}.yaml")[0] == 0


# ---- the Trainer ----


def optimizer_of(optim, plugin=None, model=None, **options):
    """The class that a Trainer of these settings would make."""
    args = tiny.arguments(optim=optim, **options)
    if plugin is not None:
        args.deepspeed_plugin = plugin
    return Trainer.get_optimizer_cls_and_kwargs(args, model)[0]


def refused(optim, message, **settings):
    with pytest.raises(ValueError, match=f"(?s){optim} cannot be used under .*{message}"):
        optimizer_of(optim, **settings)


def test_nothing_is_refused_on_one_device_or_under_ddp(name, monkeypatch):
    args = tiny.arguments(optim=name)
    for world, kind in (("1", "single"), ("2", "ddp")):
        monkeypatch.setenv("WORLD_SIZE", world)  # as a launcher does
        assert reader.of_arguments(args, torch.nn.Linear(2, 2)) == Layout(kind)
        assert Trainer.get_optimizer_cls_and_kwargs(args, None)[0] is hf_optim.info(name).cls


def test_fp16_of_the_launcher_unless_the_arguments_say_bf16(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    settings = {"optim_args": "gradient_release=true", "max_grad_norm": 0.0}
    refused("sm3", "the scaler of fp16.*use bf16", **settings)
    assert optimizer_of("sm3", bf16=True, **settings) is hf_optim.SM3


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_of_training_arguments(name, version):
    settings = {"fsdp": True, "fsdp_config": {"version": version}}
    if version == 2 or name in ALONE:
        assert optimizer_of(name, **settings) is hf_optim.info(name).cls
    else:
        refused(name, "FSDP1 gives .*flat pieces.*`fsdp_version: 2`", **settings)


@pytest.mark.parametrize("version", ["1", "2", None])
def test_fsdp_of_accelerate_launch(name, version, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    if version == "2" or name in ALONE:
        assert optimizer_of(name) is hf_optim.info(name).cls
    else:
        refused(name, "FSDP1")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed(name, stage):
    plugin = DeepSpeedPlugin(zero_stage=stage)
    if stage == 0 or name in ALONE - ({"adalo"} if stage == 3 else set()):
        assert optimizer_of(name, plugin) is hf_optim.info(name).cls
    else:
        refused(name, f"ZeRO {stage}.*FSDP2", plugin=plugin)


def test_deepspeed_that_swaps_the_optimizer(name):
    refused(name, "DeepSpeedCPUAdam.*" + KEY, plugin=DeepSpeedPlugin(hf_ds_config=OFFLOAD))
    inline = DeepSpeedPlugin(zero_stage=2, offload_optimizer_device="cpu")
    refused(name, "DeepSpeedCPUAdam.*" + KEY, plugin=inline)
    kept = DeepSpeedPlugin(hf_ds_config={**OFFLOAD, "zero_force_ds_cpu_optimizer": False})
    if name in ALONE:
        assert optimizer_of(name, kept) is hf_optim.info(name).cls


def test_deepspeed_slices_weights_of_tensor_parallelism():
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 0}, "tensor_parallel": {"autotp_size": 2}})
    refused("sm3", "tensor parallelism", plugin=plugin)
    assert optimizer_of("adamw", plugin) is hf_optim.AdamW


def test_optimizer_section_is_refused_where_trainer_would_ignore_the_name():
    from transformers.integrations import deepspeed

    args = tiny.arguments(optim="adalo")
    config = type("Config", (), {"config": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}})
    with pytest.raises(ValueError, match="adalo cannot be used under DeepSpeed ZeRO 2: the `optimizer` section"):
        deepspeed.deepspeed_optim_sched(None, config, args, 10, [])


def test_tensor_parallelism(monkeypatch):
    model = tiny.model()
    model._tp_size = 2
    refused("muon", "tensor parallelism", model=model)
    assert optimizer_of("adamw", model=model) is hf_optim.AdamW
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    refused("muon", "tensor parallelism")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "1")
    assert optimizer_of("muon") is hf_optim.info("muon").cls


def test_options_count_and_create_optimizer_raises(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    refused("adamw", "`cautious=True`", optim_args="cautious=true")
    with pytest.raises(ValueError, match="sm3 cannot be used under FSDP1: SM3"):
        tiny.trainer(optim="sm3").create_optimizer()
    assert type(tiny.trainer(optim="adamw").create_optimizer()) is hf_optim.AdamW
