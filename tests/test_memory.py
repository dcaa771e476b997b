# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Predicted memory is that of real runs: state, weights and gradients to the byte, the step's own by the allocator."""

import json

import pytest
import torch
import torch.distributed as dist
from engine import BF16, moments
from ranks import launch
from test_cli import printed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from typer.testing import CliRunner

import hf_optim
from hf_optim.cli.errors import UserError
from hf_optim.cli.main import app
from hf_optim.core import execute, sharding
from hf_optim.trainer import blueprint


LLAMA_8B = {  # meta-llama/Llama-3.1-8B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TINY = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=61, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=28)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    ),
}  # fmt: skip


def held(tensors):
    """Bytes of the storages behind tensors, each once."""
    storages = {sharding.local(x).untyped_storage()._cdata: sharding.local(x).untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def of_state(optimizer):
    return held(x for own in optimizer.state.values() for x in own.values() if torch.is_tensor(x))


def step(optimizer):
    optimizer.step(loss=1.0 if optimizer.needs_loss else None)


def stepped(name, net, **options):
    optimizer = hf_optim.create(name, net, **options)
    for p in net.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    step(optimizer)
    return optimizer


def peak(run):
    """The most bytes that were allocated at a time during `run()`, as PyTorch's CPU allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# ---- one device --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["in turn", *(pytest.param(kind, marks=pytest.mark.slow) for kind in TINY)])
def test_weights_gradients_and_state_to_the_byte(name, kind):
    settings = [(torch.float32, {}), (BF16, {"precision": "kahan"})]
    if kind == "in turn":
        turn = hf_optim.list_optimizers().index(name)
        kind, settings = list(TINY)[turn % len(TINY)], settings[turn % 2 :][:1]
    for dtype, options in settings:
        net = TINY[kind]().to(dtype)
        expected = hf_optim.estimate_memory(net, name, **options)
        optimizer = stepped(name, net, **options)
        assert expected.state == of_state(optimizer)
        assert expected.weights == held([*net.parameters(), *net.buffers()])
        assert expected.gradients == held(p.grad for p in net.parameters()) and expected.buckets == 0


@pytest.mark.parametrize("options", [{"lookahead": True}, {"decay": "cpr"}, {"state_dtype": "bfloat16"}])
def test_state_of_flags_and_narrow_state_count(options):
    plain, net = hf_optim.estimate_memory(TINY["gpt2"](), "adamw"), TINY["gpt2"]()
    expected = hf_optim.estimate_memory(net, "adamw", **options)
    assert expected.state == of_state(stepped("adamw", net, **options)) != plain.state


def test_frozen_weights_have_neither_gradient_nor_state():
    net = TINY["bert"]()
    net.bert.requires_grad_(False)
    expected, optimizer = hf_optim.estimate_memory(net, "smmf"), stepped("smmf", net)
    trained = held(p for p in net.parameters() if p.requires_grad)
    assert expected.state == of_state(optimizer) and expected.gradients == trained < expected.weights


def test_the_model_is_left_alone():
    net = TINY["gpt2"]()
    hf_optim.estimate_memory(net, "adamw", gradient_release=True)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in net.parameters())


def test_embeddings_of_muon_go_to_adamw():
    net = TINY["gpt2"]()
    inside = sum(p.numel() for n, p in net.named_parameters() if p.ndim > 1 and "wte" not in n and "wpe" not in n)
    rest = sum(p.numel() for p in net.parameters()) - inside
    assert hf_optim.estimate_memory(net, "muon").state == 4 * inside + 8 * rest


FLOAT = {"muon": {"iterate_in": "float32"}}  # products of bf16 matrices take memory of their own on CPUs


@pytest.mark.parametrize("kind", ["kahan", *(pytest.param(k, marks=pytest.mark.slow) for k in ("fp32", "stochastic"))])
def test_what_a_step_holds_is_what_the_allocator_saw(name, kind, monkeypatch):
    monkeypatch.setattr(execute, "BLOCK", 1 << 40)  # a GPU works on whole tensors
    net = torch.nn.Sequential(torch.nn.Linear(160, 192), torch.nn.Linear(192, 64)).to(
        torch.float32 if kind == "fp32" else BF16
    )
    options = {"backend": "loop", **FLOAT.get(name, {}), **({} if kind == "fp32" else {"precision": kind})}
    expected = hf_optim.estimate_memory(net, name, **options).temporaries
    optimizer = stepped(name, net, **options)
    assert expected == pytest.approx(peak(lambda: step(optimizer)), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "rounding"), [(1, None), (8, None), (1, "stochastic"), (1, "kahan")])
def test_a_compiled_step_stays_below_its_bound(name, count, rounding):
    torch._dynamo.reset()
    net = torch.nn.Sequential(*[torch.nn.Linear(1024, 512, bias=False) for _ in range(count)])
    options = {"backend": "fused", **FLOAT.get(name, {})}
    if rounding:
        net, options = net.to(BF16), {**options, "precision": rounding, "state_dtype": "bfloat16", **moments(name)}
    expected = hf_optim.estimate_memory(net, name, **options).temporaries
    optimizer = stepped(name, net, **options)
    step(optimizer)
    seen = peak(lambda: step(optimizer))
    assert seen <= 1.01 * expected + 4096 and (seen > 4096) <= (expected > 0)


def test_released_gradients():
    net = TINY["llama"]()
    full, released = (hf_optim.estimate_memory(net, "smmf", backend="loop", gradient_release=r) for r in (False, True))
    assert released.gradients == max(p.nbytes for p in net.parameters()) < full.gradients
    assert (released.state, released.temporaries) == (full.state, full.temporaries)
    with pytest.raises(ValueError, match="needs all gradients at once"):
        hf_optim.estimate_memory(net, "am_sgd", gradient_release=True)


def test_a_tied_weight_has_three_gradients_for_a_moment():
    config = LlamaConfig(
        vocab_size=20000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    net = LlamaForCausalLM(config)
    expected = hf_optim.estimate_memory(net, "sm3", backend="fused", gradient_release=True)
    optimizer = hf_optim.create("sm3", net, backend="fused")
    optimizer.release_gradients()

    def run():
        net(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
        optimizer.step()

    run()
    assert peak(run) == pytest.approx(expected.gradients + expected.temporaries, rel=0.15)


# ---- many devices ------------------------------------------------------------------------------------------------
def shard(net, mesh, policy):
    """As accelerate's TRANSFORMER_BASED_WRAP does, for a GPT-2 whose embeddings are tied."""
    for layer in net.transformer.h:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def check_shards(expected, dtype, options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=BF16)
    for name in expected:
        net = shard(TINY["gpt2"]().to(dtype), mesh, policy if dtype == torch.float32 else MixedPrecisionPolicy())
        net(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
        optimizer = hf_optim.create(name, net, **options)
        step(optimizer)
        own = expected[name][dist.get_rank()]
        assert of_state(optimizer) == own.state, name
        assert held([*net.parameters(), *net.buffers()]) == own.weights, name
        assert held(p.grad for p in net.parameters()) == own.gradients, name


@pytest.mark.parametrize(
    ("world", "dtype", "options", "names"),
    [
        (2, torch.float32, {}, ("smmf",)),
        (3, BF16, {"precision": "kahan"}, ("adafactor_corrected",)),
        pytest.param(2, BF16, {"precision": "kahan"}, None, marks=pytest.mark.slow),
        pytest.param(3, torch.float32, {}, None, marks=pytest.mark.slow),
    ],
)
def test_shards_to_the_byte_on_every_rank(world, dtype, options, names):
    net, ranks = TINY["gpt2"]().to(dtype), range(world)
    expected = {
        name: [hf_optim.estimate_memory(net, name, layout="fsdp2", world=world, rank=r, **options) for r in ranks]
        for name in names or hf_optim.list_optimizers()
    }
    assert not dist.is_initialized()
    launch(world, check_shards, expected, dtype, options)


def matrices():
    return torch.nn.Sequential(*(torch.nn.Linear(m, n, bias=False) for m, n in ((256, 192), (192, 8))))


def check_step(expected):
    execute.BLOCK = 1 << 40
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, size in expected.items():
        optimizer = stepped(name, fully_shard(matrices(), mesh=mesh), **FLOAT.get(name, {}))
        assert peak(lambda: step(optimizer)) == pytest.approx(size, rel=0.05), name  # noqa: B023


@pytest.mark.parametrize("names", [("smmf", "muon"), pytest.param(None, marks=pytest.mark.slow)])
def test_what_a_sharded_step_holds_is_what_the_allocator_saw(names):
    expected = {}
    for name in names or hf_optim.list_optimizers():
        made = hf_optim.estimate_memory(matrices(), name, layout="fsdp2", world=2, **FLOAT.get(name, {}))
        expected[name] = made.temporaries
    launch(2, check_step, expected)


def check_compiled_step(expected):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, size in expected.items():
        optimizer = stepped(name, fully_shard(squares(), mesh=mesh), backend="fused")
        assert not execute._broken and peak(lambda: step(optimizer)) <= size + 1024, name  # noqa: B023


def squares():
    return torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(3)))


@pytest.mark.parametrize("names", [("sm3",), pytest.param(None, marks=pytest.mark.slow)])
def test_what_a_compiled_step_of_shards_holds(names):
    expected = {}
    for name in names or hf_optim.list_optimizers():
        made = hf_optim.estimate_memory(squares(), name, layout="fsdp2", world=2, backend="fused")
        expected[name] = made.temporaries
    launch(2, check_compiled_step, expected)


def check_release(expected):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net, most = shard(TINY["gpt2"](), mesh, MixedPrecisionPolicy()), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: most.append(held([p.grad])))
    optimizer = hf_optim.create("adamw", net)
    optimizer.release_gradients()
    net(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    assert max(most) == expected


def test_released_shards_come_by_layer():
    net = TINY["gpt2"]()
    released = hf_optim.estimate_memory(net, "adamw", layout="fsdp2", world=2, gradient_release=True).gradients
    assert released < hf_optim.estimate_memory(net, "adamw", layout="fsdp2", world=2).gradients
    launch(2, check_release, released)


def test_accelerate_keeps_fp32_under_fsdp2_only():
    net = TINY["gpt2"]().to(BF16)
    net.transformer.wte.requires_grad_(False)
    frozen, trained = (sum(p.numel() for p in net.parameters() if p.requires_grad is r) for r in (False, True))
    sharded = hf_optim.estimate_memory(net, "adamw", layout="fsdp2", mixed_precision="bf16")
    buffers = sum(b.nbytes for b in net.buffers())
    assert sharded.weights == 2 * frozen + 4 * trained + buffers and sharded.gradients == 4 * trained
    one = hf_optim.estimate_memory(net, "adamw", mixed_precision="bf16")
    assert one.weights == 2 * frozen + 2 * trained + buffers and one.gradients == 2 * trained


def test_ddp_holds_every_gradient_twice():
    net = TINY["gpt2"]()
    one, many = hf_optim.estimate_memory(net, "adamw"), hf_optim.estimate_memory(net, "adamw", layout="ddp", world=2)
    assert many.buckets == one.gradients and many.total == one.total + many.buckets


# ---- CUDA --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["loop", "fused"])
def test_a_real_step_on_a_gpu(name, backend):
    net = torch.nn.Sequential(torch.nn.Embedding(8000, 1024), *[torch.nn.Linear(1024, 1024) for _ in range(8)])
    expected = hf_optim.estimate_memory(net, name, backend=backend)
    torch.empty(512, 512, device="cuda") @ torch.empty(512, 512, device="cuda")  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    net.cuda()
    optimizer = stepped(name, net, backend=backend)
    torch.cuda.reset_peak_memory_stats()
    step(optimizer)
    seen = torch.cuda.max_memory_allocated() - before
    assert seen <= 1.05 * expected.total and (backend == "fused" or seen >= 0.95 * expected.total)


# ---- the command -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Name of a tiny model -> a folder with its config and nothing else."""
    root = tmp_path_factory.mktemp("models")
    for kind, make in TINY.items():
        net = make()
        net.config.architectures = [type(net).__name__]
        net.config.save_pretrained(root / kind)
    (root / "8b").mkdir()
    (root / "8b" / "config.json").write_text(json.dumps(LLAMA_8B))
    return root


def test_a_blueprint_is_the_model(folder):
    for kind, make in TINY.items():
        made, real = blueprint.from_config(str(folder / kind)), make()
        assert type(made) is type(real) and all(p.is_meta for p in made.parameters())
        shapes = [{n: (p.shape, p.dtype) for n, p in net.named_parameters()} for net in (made, real)]
        assert shapes[0] == shapes[1]
        assert next(blueprint.from_config(str(folder / kind), "bf16").parameters()).dtype == BF16


def test_a_blueprint_is_the_model_as_it_is_loaded(tmp_path):
    small = {"d_model": 16, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    t5 = T5Config(**small, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 10}
    whisper = WhisperConfig(**small, **layers, **heads, max_target_positions=10, bos_token_id=0)
    for cls, config, dtype in (
        (T5ForConditionalGeneration, t5, torch.float16),  # parts of it stay in fp32
        (WhisperForConditionalGeneration, whisper, torch.float32),  # its positions are made without a gradient
    ):
        config.dtype = dtype
        cls(config).to(dtype).save_pretrained(tmp_path / cls.__name__)
        real = cls.from_pretrained(tmp_path / cls.__name__, dtype=dtype)
        made = blueprint.from_config(str(tmp_path / cls.__name__))
        facts = [{n: (p.dtype, p.requires_grad) for n, p in net.named_parameters()} for net in (made, real)]
        assert facts[0] == facts[1]


def test_an_8b_model_in_24_gb(folder):
    words = ("memory", str(folder / "8b"), "--release", "--budget", "24GB")
    facts = json.loads(printed(*words, "--json"))
    assert facts["parameters"] == 8_030_261_248 and facts["budget"] == 24e9
    rows = {row["name"]: row for row in facts["optimizers"]}
    assert set(rows) | set(facts["left_out"]) == set(hf_optim.list_optimizers())
    assert list(rows) == sorted(rows, key=lambda n: rows[n]["total"])
    assert rows["adamw"]["state"] == 8 * facts["parameters"] and rows["adamw"]["gradients"] == 2 * 128256 * 4096
    fits = {name for name, row in rows.items() if row["total"] <= 24e9}
    assert {"adafactor_corrected", "sm3", "amos", "smmf"} <= fits and not {"adamw", "muon"} & fits
    text = printed(*words, "--optim", "adamw,smmf")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert list(lines)[-3:-1] == ["smmf", "adamw"] and lines["adamw"][-1] == "no" and "activations" in text
    assert float(lines["smmf"][-1]) == pytest.approx(24 - rows["smmf"]["total"] / 1e9, abs=0.01)


def test_a_config_without_its_architecture(tmp_path):
    config = {key: value for key, value in LLAMA_8B.items() if key != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert type(blueprint.from_config(str(tmp_path / "config.json"))) is LlamaForCausalLM


def test_lora_trains_the_adapters(folder):
    pytest.importorskip("peft")
    for saved in ("lm_head", "[lm_head]"):
        net = blueprint.with_lora(blueprint.from_config(str(folder / "llama")), f"r=4,modules_to_save={saved}")
        assert {n.split(".")[3] for n, p in net.named_parameters() if p.requires_grad and "lora" not in n} == {
            "modules_to_save"
        }
    net = blueprint.with_lora(blueprint.from_config(str(folder / "llama"), "bf16"), "r=4,target_modules=[q_proj]")
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 4 * (16 + 16)
    for name in hf_optim.list_optimizers():
        real = blueprint.with_lora(blueprint.from_config(str(folder / "llama"), "bf16"), "r=4,target_modules=[q_proj]")
        real = real.to_empty(device="cpu")
        for p in real.parameters():
            torch.nn.init.ones_(p)
        expected = hf_optim.estimate_memory(net, name)
        assert expected.state == of_state(stepped(name, real))
        assert (
            expected.gradients
            == sum(p.nbytes for p in trained)
            == held(p.grad for p in real.parameters() if p.requires_grad)
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gpt2", "--optim", "adallo"), "did you mean 'adalo'"),
        (("gpt2", "--optim", "adamw", "--optim-args", "beta=1"), "unknown option `beta`"),
        (("gpt2", "--optim", "smmf", "--optim-args", "matricize=square", "--fsdp2"), "use `rows` under FSDP2"),
        (("gpt2", "--budget", "24"), "such as 24GB, got '24'"),
        (("gpt2", "--dtype", "fp8"), "`dtype` must be one of bf16, fp32, got 'fp8'"),
        (("gpt2", "--mixed-precision", "fp8"), "must be one of no, bf16, fp16, got 'fp8'"),
        (("gpt2", "--world", "2"), "`world=2` needs `layout='ddp'` or `layout='fsdp2'`"),
        (("gpt2", "--fsdp2", "--world", "0"), "`world` must be at least 1, got 0"),
        (("gpt2", "--ddp", "--fsdp2"), "not both"),
        (("gpt2", "--mixed-precision", "fp16", "--release"), "leaves no gradients to the scaler of fp16"),
        (("gpt2", "--ddp", "--world", "2", "--release"), "the first says: adamw cannot be used under ddp"),
        (("gpt2", "--release", "--optim-args", "gradient_release=false"), "--release, or `gradient_release` in"),
        (("nothing",), "Give a config.json"),
    ],
)
def test_mistakes_are_one_line(folder, words, message):
    source, *rest = words
    result = CliRunner().invoke(app, ["memory", str(folder / source), *rest])
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert "\n" not in str(result.exception)
