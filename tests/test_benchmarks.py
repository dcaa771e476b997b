# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""bench_finetune.py and compare_precision.py: what they measure is what they say, and failures are told."""

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def finetune(script, monkeypatch, tmp_path):
    """The script, with the first lines of the text."""
    script("hf_optim").register()
    module = script("bench_finetune")
    (tmp_path / "train.txt").write_bytes(b"".join(module.TEXT.read_bytes().splitlines(keepends=True)[:100]))
    monkeypatch.setattr(module, "TEXT", tmp_path / "train.txt")
    return module


def shell(name, *arguments):
    """Runs a script as from the shell, on one thread."""
    command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------ bench_finetune


def job(finetune, **changes):
    shared = {"device": "cpu", "seq_length": 16, "batch_size": 2, "warmup": 1, "steps": 2}
    return finetune.Job(finetune.CONFIGS["tiny"], **{**shared, **changes})


@pytest.mark.parametrize("model, parameters", [("llama-8b", 8_030_261_248), ("llama-1b", 1_235_814_400)])
def test_the_models_are_those_of_llama(finetune, model, parameters):
    made = finetune.new_model(finetune.CONFIGS[model], "meta")  # nothing is allocated anywhere else
    assert made.num_parameters() == parameters
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert {x.device.type for x in (*made.parameters(), *made.buffers())} == {"meta"}
    assert made.training and not made.config.use_cache
    assert all(layer.gradient_checkpointing for layer in made.model.layers)


@pytest.mark.parametrize(
    "text, optim, optim_args, release",
    [
        ("adamw_torch_fused", "adamw_torch_fused", None, False),
        ("sm3+release", "sm3", None, True),
        ("adamw:eps=1e+3,beta1=0.8", "adamw", "eps=1e+3,beta1=0.8", False),
        ("muon:ns_coefficients='1,2'+release", "muon", "ns_coefficients='1,2'", True),
    ],
)
def test_optim_is_name_options_release(finetune, text, optim, optim_args, release):
    assert finetune.Arm.parse(text) == (text, optim, optim_args, release)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--optim", "adamw:beta3=1"], "unknown option `beta3`"),
        (["--optim", "adamv"], "did you mean 'adamw'"),
        (["--optim", "adafactor+release"], "goes with the optimizers of hf_optim, not with 'adafactor'"),
        (["--model", "llama-9b"], "llama-8b, llama-1b, tiny or the path of a config, got 'llama-9b'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(finetune, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setattr(finetune, "run_all", None)
    app = importlib.import_module("typer").Typer()
    app.command()(finetune.bench)
    result = CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_a_config_names_its_file(finetune, tmp_path):
    finetune.CONFIGS["tiny"].save_pretrained(tmp_path / "llama-3.1")
    (tmp_path / "other.json").write_text((tmp_path / "llama-3.1" / "config.json").read_text())
    for path, name in (("llama-3.1", "llama-3.1"), ("llama-3.1/config.json", "llama-3.1"), ("other.json", "other")):
        found, config = finetune.chosen_config(str(tmp_path / path))
        assert found == name and config.hidden_size == 64
    assert finetune.chosen_config("tiny") == ("tiny", finetune.CONFIGS["tiny"])


def test_release_changes_memory_and_nothing_else(finetune):
    ordinary, released = (
        finetune.measure(job(finetune), finetune.Arm.parse(f"adamw:precision=stochastic{mark}"))
        for mark in ("", "+release")
    )
    assert ordinary["losses"] == released["losses"] and len(released["losses"]) == 3
    n = ordinary["parameters"]
    assert ordinary["state_bytes"] == released["state_bytes"] == 8 * n
    # All bf16 gradients at once, or those of the largest layer.
    assert ordinary["peak_bytes"] >= (2 + 8 + 2) * n
    assert released["peak_bytes"] < ordinary["peak_bytes"] - n
    for result in (ordinary, released):
        assert 0 < result["optimizer_seconds"] < result["step_seconds"]
        assert result["tokens_per_second"] * result["step_seconds"] == pytest.approx(32)
        assert result["reserved_bytes"] is None  # no GPU, no figure of one


@pytest.mark.gpu
def test_a_gpu_counts_its_own_memory_and_time(finetune):
    arms = [finetune.Arm.parse(text) for text in ("adamw_torch_fused", "adamw:backend=loop+release")]
    for result in (finetune.measure(job(finetune, device="cuda"), arm) for arm in arms):
        assert "error" not in result, result
        assert result["reserved_bytes"] >= result["peak_bytes"] >= result["warmup_peak_bytes"] > 0
        assert result["peak_bytes"] > 2 * result["parameters"] + result["state_bytes"]
        assert 0 < result["optimizer_seconds"] < result["step_seconds"]


def test_the_loss_reaches_an_optimizer_that_needs_it(finetune):
    result = finetune.measure(job(finetune), finetune.Arm.parse("adalo:mode=compliant+release"))
    assert "error" not in result and len(result["losses"]) == 3


def test_the_time_inside_the_optimizer_is_that_of_its_steps(finetune, monkeypatch):
    """Under release, too, where steps run inside backward, one for each tensor."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(finetune.time, "perf_counter", lambda: float(next(ticks)))
    result = finetune.measure(job(finetune), finetune.Arm.parse("adamw+release"))
    tensors = len(list(finetune.new_model(finetune.CONFIGS["tiny"], "cpu").parameters()))
    assert result["optimizer_seconds"] == tensors + 1  # every tick is a reading; `step()` closes the window


@pytest.mark.parametrize("error, memory", [(torch.OutOfMemoryError("no room"), True), (RuntimeError("a bug"), False)])
def test_a_failure_is_a_row(finetune, monkeypatch, error, memory):
    monkeypatch.setattr(finetune, "new_model", lambda *_: (_ for _ in ()).throw(error))
    result = finetune.measure(job(finetune), finetune.Arm.parse("adamw"))
    assert result == {"optim": "adamw", "out_of_memory": memory, "error": f"{type(error).__name__}: {error}"}


def test_batches_are_text_that_starts_over(finetune):
    (long,) = finetune.new_batches(job(finetune, seq_length=1 << 14, batch_size=1), 1)
    assert int(long.max()) < finetune.CONFIGS["tiny"].vocab_size
    starts = (long[0].unfold(0, 64, 1) == long[0, :64]).all(-1).nonzero().flatten().tolist()
    assert starts[0] == 0 and len(starts) >= 2  # the text again
    first, second = finetune.new_batches(job(finetune, seq_length=32, batch_size=1), 2)
    assert torch.equal(torch.cat([first[0], second[0]]), long[0, :64])


def made_up(optim, **figures):
    shared = {"peak_bytes": 70 << 30, "reserved_bytes": 72 << 30, "state_bytes": 30 << 30, "step_seconds": 0.5}
    return {"optim": optim, **shared, "tokens_per_second": 4096.0, "optimizer_seconds": 0.0255, **figures}


def made_up_record():
    failed = {"optim": "adamw", "out_of_memory": True, "error": "OutOfMemoryError: Tried to allocate 1 GiB"}
    ours = made_up("sm3:precision=stochastic,backend=fused+release", peak_bytes=21 << 30, tokens_per_second=6144.0)
    head = {"model": "llama-8b", "machine": "a GPU", "batch_size": 1, "seq_length": 2048, "steps": 9, "memory": "m"}
    return {**head, "results": [made_up("adamw_torch_fused"), failed, ours]}


def test_table_ratios_and_bars(finetune):
    record, out = made_up_record(), io.StringIO()
    Console(file=out, width=80).print(finetune.result_table(record))
    rows = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert ["adamw_torch_fused", "70.00", "72.00", "30.00", "0.500", "25.5", "4,096"] in rows
    assert ["sm3", "21.00", "72.00", "30.00", "0.500", "25.5", "6,144"] in rows
    assert ["out", "of", "memory"] in rows and [":precision=stochastic,"] in rows and ["+release"] in rows
    assert "…" not in out.getvalue()

    (line,) = finetune.ratios(record["results"])
    assert line.startswith("sm3:precision=stochastic,backend=fused+release: 0.300 x the peak memory and 1.500 x the")
    assert finetune.ratios(record["results"][1:]) == ["No ratios: adamw_torch_fused was not measured."]

    left, right = finetune.bars(record).axes
    assert [bar.get_width() for bar in left.patches] == [21, 0, 70]
    assert [bar.get_width() for bar in right.patches] == [6144, 0, 4096]
    assert [text.get_text() for text in left.texts] == ["21", "out of memory", "70"]


def test_only_results_of_the_same_machine_and_settings_share_a_file(finetune, tmp_path):
    record = made_up_record()
    record["date"] = "yesterday"
    head = {**{key: value for key, value in record.items() if key != "results"}, "date": "today"}
    path = tmp_path / "finetune.json"
    assert finetune.earlier(path, head, []) == []
    path.write_text(json.dumps(record))
    assert [r["optim"] for r in finetune.earlier(path, head, ["adamw"])] == [
        "adamw_torch_fused",
        "sm3:precision=stochastic,backend=fused+release",
    ]
    assert finetune.earlier(path, {**head, "machine": "another GPU"}, ["adamw"]) == []


@pytest.mark.slow
def test_finetune_from_the_shell(finetune, tmp_path):
    config = tmp_path / "small" / "config.json"
    finetune.CONFIGS["tiny"].save_pretrained(config.parent)
    shared = ["--model", config, "--device", "cpu", "--seq-length", 16, "--steps", 2, "--warmup", 1]
    names = ["adamw_torch_fused", "adafactor_corrected:precision=stochastic+release"]
    result = shell("bench_finetune", *shared, "--output-dir", tmp_path, "--optim", names[0], "--optim", names[1])
    assert result.returncode == 0, result.stderr
    assert f"{names[1]}: " in result.stdout and f"the tokens per second of {names[0]}" in result.stdout
    record = json.loads((tmp_path / "finetune_small_cpu.json").read_text())
    assert [r["optim"] for r in record["results"]] == names
    assert {"date", "machine", "torch", "transformers", "accelerate", "seq_length", "memory"} <= record.keys()
    assert (tmp_path / "finetune_small_cpu.png").read_bytes().startswith(b"\x89PNG")

    # A second call adds to the file; one that fails is a row, and the exit code says so.
    failing = "stable_decay_adamw+release"
    result = shell("bench_finetune", *shared, "--output-dir", tmp_path, "--optim", failing)
    assert result.returncode == 1
    record = json.loads((tmp_path / "finetune_small_cpu.json").read_text())
    assert [r["optim"] for r in record["results"]] == [*names, failing]
    assert "needs all gradients at once" in record["results"][2]["error"]
    assert record["results"][2]["out_of_memory"] is False


# --------------------------------------------------------------------------------------------------- compare_precision


def made_up_runs(compare):
    """Two seeds with 0.5 between them; nearest rounding loses 0.1 and 0.2, stochastic rounding gains 0.01."""
    lost = {"nearest": (0.1, 0.2), "stochastic": (-0.01, -0.01)}
    runs = {}
    for arm in [compare.Arm("adamw", "adamw", "float32")] + [
        compare.Arm("adamw", "adamw", "bfloat16", f"precision={how}") for how in lost
    ]:
        by_seed = lost.get(arm.settings.removeprefix("precision="), (0.0, 0.0))
        runs[arm] = [
            {
                "seed": seed,
                "train_loss": 4 + seed / 2 + more,
                "eval_loss": 5 + seed / 2 + more,
                "bytes_per_parameter": 10.0,
                "losses": [6.0, 5.0 + more],
            }
            for seed, more in enumerate(by_seed, 1)
        ]
    return runs


def test_precision_is_compared_seed_by_seed(script):
    compare = script("compare_precision")
    fp32, nearest, stochastic = compare.summary(made_up_runs(compare))
    assert fp32["eval_loss"] == {"mean": 5.75, "sd": pytest.approx(0.5**0.5 / 2)}
    assert fp32["eval_loss_minus_fp32"] == {"mean": 0, "sd": 0}
    assert nearest["eval_loss_minus_fp32"] == {"mean": pytest.approx(0.15), "sd": pytest.approx(0.1 / 2**0.5)}
    assert stochastic["train_loss_minus_fp32"] == {"mean": pytest.approx(-0.01), "sd": pytest.approx(0, abs=1e-12)}
    assert compare.spread([1.0]) == {"mean": 1.0, "sd": None}


def test_precision_table_plot_and_readme(script, monkeypatch, tmp_path):
    compare, make_table = script("compare_precision"), script("make_table")
    head = {"seeds": 2, "steps": 20, "date": "today", "machine": "a CPU", "torch": "3"}
    record = {**head, "arms": compare.summary(made_up_runs(compare))}
    out = io.StringIO()
    Console(file=out, width=80).print(compare.result_table(record))
    rows = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert ["adamw", "bfloat16", "10.00", "4.9000", "5.9000", "0.1500"] in rows
    assert ["precision=nearest", "±", "0.4243", "±", "0.4243", "±", "0.0707"] in rows
    assert "…" not in out.getvalue()

    (axes,) = compare.loss_curves(record).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["adamw precision=nearest", "adamw precision=stochastic"]
    means = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert means["adamw precision=nearest"] == pytest.approx([0, 0.15])
    assert means["adamw precision=stochastic"] == pytest.approx([0, -0.01])

    monkeypatch.setattr(make_table, "PRECISION", tmp_path / "precision.json")
    make_table.PRECISION.write_text(json.dumps(record))
    text = make_table.precision()
    assert "| `adamw` | bfloat16 | `precision=nearest` | 10.00 | 5.900 ± 0.424 | 0.150 ± 0.071 |" in text
    assert "| `adamw` | float32 |  | 10.00 | 5.750 ± 0.354 |  |" in text
    assert text.endswith("over 2 seeds, 20 steps; today, a CPU, torch 3.")


def test_every_arm_has_one_fp32_run_and_known_settings(script):
    compare = script("compare_precision")
    for arm in compare.ARMS:
        assert sum(a.rule == arm.rule and a.dtype == "float32" for a in compare.ARMS) == 1
    first = {arm.rule: arm.dtype for arm in reversed(compare.ARMS)}
    assert set(first.values()) == {"float32"}  # the plot takes the first of a rule for it


@pytest.mark.slow
def test_precision_runs_start_from_the_same_model(script, monkeypatch, tmp_path):
    compare = script("compare_precision")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    compare.quiet()
    fp32, bf16 = (compare.run(arm, seed=1, steps=20) for arm in (compare.ARMS[0], compare.ARMS[3]))
    assert len(fp32["losses"]) == len(bf16["losses"]) == 2
    assert fp32["losses"] == pytest.approx(bf16["losses"], abs=0.01) and fp32["losses"] != bf16["losses"]
    assert fp32["train_loss"] == pytest.approx(sum(fp32["losses"]) / 2)
    assert (fp32["bytes_per_parameter"], bf16["bytes_per_parameter"]) == (12, 10)


@pytest.mark.slow
def test_precision_from_the_shell(tmp_path):
    """All arms, each in its process."""
    result = shell("compare_precision", "--steps", 10, "--seeds", 1, "--jobs", 2, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "precision.json").read_text())
    assert [arm["dtype"] for arm in record["arms"]].count("float32") == 4 and len(record["arms"]) == 15
    assert all(len(arm["runs"]) == 1 and len(arm["runs"][0]["losses"]) == 1 for arm in record["arms"])
    assert record["steps"] == 10 and record["seeds"] == 1 and "date" in record
    assert (tmp_path / "precision.png").read_bytes().startswith(b"\x89PNG")
    assert "precision=kahan" in result.stdout


# ---------------------------------------------------------------------------------------------------------- bench_step


def test_what_does_not_fit_leaves_the_others_their_figures(script, monkeypatch, tmp_path, capsys):
    bench = script("bench_step")
    real = bench.measure

    def measure(b, name, *rest):
        if name == "muon":
            raise torch.OutOfMemoryError
        return real(b, name, *rest)

    monkeypatch.setitem(bench.SHAPES, "gpt2", lambda: [(4, 4)] * 2)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench.Bench, "bandwidth", lambda b: 1e9)

    def in_a_process(call, names, rounds, caches):
        with monkeypatch.context() as inside:
            inside.setattr(torch, "set_num_threads", lambda n: None)
            bench.main(names, "gpt2", "float32", "cpu", "backend=loop", rounds, 1, 0, tmp_path)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert in_a_process([], ["adalo", "muon"], 1, "")["adalo"]["state_bytes"] == 4
    assert in_a_process([], ["adalo"], 0, "")["adalo"]["programs"] == 0  # in the loop
    monkeypatch.setattr(bench, "in_a_process", in_a_process)
    bench.main(["adalo", "muon"], "gpt2", "float32", "cpu", "", 1, 1, 1, tmp_path)
    record = json.loads((tmp_path / "step_gpt2_float32_cpu.json").read_text())
    assert list(record["optimizers"]) == ["adalo"] and record["out_of_memory"] == ["muon"]
    assert "out of memory: muon" in capsys.readouterr().out


def test_first_steps_alone_are_taken_in_this_process(script):
    bench = script("bench_step")
    with pytest.raises(bench.typer.BadParameter, match="--processes 0"):
        bench.main(["adalo"], device="cpu", rounds=0)


def test_one_gpu_of_several_is_chosen_by_the_environment(script):
    bench = script("bench_step")
    with pytest.raises(bench.typer.BadParameter, match="CUDA_VISIBLE_DEVICES"):
        bench.main(["adalo"], device="cuda:1")


def test_benchmarks_need_no_datasets():
    code = "import sys; sys.modules['datasets'] = sys.modules['evaluate'] = None; import bench_step, bench_finetune"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
