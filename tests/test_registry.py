# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The registry: names, derived facts, the README table, adding one's own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_optim
from hf_optim import registry


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


def test_readme_tables_are_generated():
    import make_table

    text = (ROOT / "README.md").read_text()
    assert make_table.with_tables(text) == text, "run `python scripts/make_table.py`"
    assert all(f"| `{name}` |" in text for name in hf_optim.list_optimizers())


def test_learning_rates_are_those_that_were_measured(name):
    found = json.loads((ROOT / "scripts" / "results" / "sweep_lr.json").read_text())["ranges"].get(name)
    rates = hf_optim.info(name).lr
    assert rates == (None if found is None else (found["lowest"], found["best"], found["highest"]))


def test_filter_and_unknown_name():
    assert hf_optim.list_optimizers("adaf*") == ["adafactor_corrected"] and len(hf_optim.list_optimizers()) >= 25
    with pytest.raises(ValueError, match="unknown optimizer 'adafactor'; did you mean 'adafactor_corrected'"):
        hf_optim.info("adafactor")
    with pytest.raises(ValueError, match="'sm4'; did you mean 'sm3'"):
        hf_optim.create("sm4", [torch.nn.Parameter(torch.zeros(1))])


def test_bytes_per_parameter_are_those_of_a_real_state(name):
    p = torch.nn.Parameter(torch.randn(256, 512))
    p.grad = torch.randn(256, 512)
    optimizer = hf_optim.create(name, [p])
    optimizer.step(loss=1.0)
    held = sum(x.nbytes for x in optimizer.state[p].values() if torch.is_tensor(x))
    info = hf_optim.info(name)
    assert registry.state_bytes(info.cls, (256, 512), info.defaults) == held


def test_register_refuses_what_is_not_ours_or_taken():
    with pytest.raises(TypeError, match="subclass of hf_optim.Optimizer"):
        registry.register(hf_optim.OptimInfo("mine", torch.optim.SGD, "", ""))
    with pytest.raises(ValueError, match="'sm3' is taken by SM3"):
        registry.register(hf_optim.OptimInfo("sm3", hf_optim.AdamW, "", ""))
    with pytest.raises(ValueError, match="`beta1` must be"):
        registry.register(hf_optim.OptimInfo("mine", hf_optim.AdamW, "", "", preset={"beta1": 2.0}))
    assert "mine" not in registry.REGISTRY


def test_model_shares_are_grouped_once():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    groups, rest = registry.param_groups(hf_optim.Amos, model, {"lr": 0.1, "etas": "2.bias:0.25"}, {"0.weight"})
    assert sorted(p.numel() for g in groups for p in g["params"]) == [5, 5, 20]
    by_size = {g.get("eta"): g for g in groups}
    assert set(by_size) == {(2 / 4) ** 0.5, 1.0, 0.25} and rest == {"lr": 0.1}
    assert "weight_decay" not in by_size[(2 / 4) ** 0.5] and by_size[0.25]["weight_decay"] == 0.0


def shares(name, model, key):
    """The names of the parameters of a model by what an option is for them."""
    names, found = {id(p): n for n, p in model.named_parameters()}, {}
    for group in hf_optim.create(name, model).param_groups:
        found.setdefault(group[key], set()).update(names[id(p)] for p in group["params"])
    return found


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
RAW = {  # parts of the names of what is no matrix that maps one hidden state to another, though it has two axes
    "gpt_oss": ({"num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 8, "vocab_size": 32}, ("_bias",)),
    "vit": ({}, ("cls_token", "position_embeddings")),
    "mamba": ({"vocab_size": 32}, ("A_log",)),
    "swin": ({"embed_dim": 16, "depths": [1], "num_heads": [2]}, ("relative_position_bias_table",)),
}


@pytest.mark.parametrize("kind", RAW)
def test_muon_gets_matrices_that_map_hidden_states(kind):
    options, raw = RAW[kind]
    config = AutoConfig.for_model(kind, **({} if kind == "swin" else SMALL), **options)
    with torch.device("meta"):
        found = shares("muon", AutoModel.from_config(config), "rule")
    for part in raw:
        assert any(part in name for name in found["adamw"]) and not any(part in name for name in found["muon"])
    assert any(name.endswith((".weight", "gate_up_proj")) for name in found["muon"])


def test_vectors_alone_have_no_output_layer():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for layer in net:
        layer.weight.requires_grad_(False)
    assert [group["agc"] for group in hf_optim.create("adamw", net, agc=True).param_groups] == [True]


def test_the_output_layer_is_known_where_peft_wraps_it():
    peft = pytest.importorskip("peft")
    config = AutoConfig.for_model("llama", **SMALL, num_key_value_heads=2, vocab_size=32)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    assert head in shares("muon", model, "rule")["adamw"]
    groups, _ = registry.param_groups(hf_optim.AdamW, model, {"agc": True})
    clipped = {id(p) for group in groups if group.get("agc", True) for p in group["params"]}
    assert id(model.get_parameter(head)) not in clipped and clipped
