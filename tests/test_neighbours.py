# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Beside the libraries that people train with: peft, TRL, accelerate, torch's schedulers, compiler and checkpointing.

What a trainer did is replayed: the batches it drew, in a plain loop, give the same losses and the same weights."""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import loss_at
from engine import brisk, everything
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
    set_seed,
)

import hf_optim
from hf_optim.trainer.loss import deliver_loss, innermost


LR, STEPS, PIECES = 1e-2, 3, 2  # learning rate, steps of a run, micro-batches of a step
OPTIONS = {"adalo": {"mode": "compliant", "beta2": 0.9}, "adafactor_corrected": {}, "muon": {}}
KINDS = pytest.mark.parametrize("kind", OPTIONS)


@pytest.fixture(autouse=True, scope="module")
def registered():
    hf_optim.register()


class AdaLoByHand:
    """AdaLo of OPTIONS, written out: the average of the loss is a Python number."""

    def __init__(self, params):
        self.params = list(params)
        self.m, self.e = [torch.zeros_like(p, dtype=torch.float64) for p in self.params], 0.0

    @torch.no_grad()
    def step(self, loss, schedule=1.0):
        self.e = 0.9 * self.e + 0.1 / (2 + loss)
        for p, m in zip(self.params, self.m):
            m.mul_(0.9).add_(0.1 * p.grad.double())
            p -= ((1 - self.e) / 3 * schedule * m).to(p.dtype)


def mean_over_tokens(net, piece, tokens):
    return net(**piece, num_items_in_batch=tokens).loss


def mean_over_pieces(net, piece, tokens):
    return net(**piece).loss / PIECES


def replay(net, batches, kind, schedule=(1.0,) * STEPS, part=mean_over_tokens):
    """Train `net` on these batches, PIECES to a step. Returns (losses, average of the loss or None)."""
    params = [p for p in net.parameters() if p.requires_grad]
    rule = AdaLoByHand(params) if kind == "adalo" else hf_optim.create(kind, net, lr=LR, **OPTIONS[kind])
    losses = []
    for step, factor in zip(range(STEPS), schedule):
        pieces = batches[step * PIECES : (step + 1) * PIECES]
        tokens = sum((piece["labels"] != -100).sum() for piece in pieces)
        net.zero_grad()
        losses.append(0.0)
        for piece in pieces:
            loss = part(net, piece, tokens)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if kind == "adalo":
            rule.step(losses[step], factor)
        else:
            for group in rule.param_groups:
                group["lr"] = LR * factor
            rule.step()
    return losses, getattr(rule, "e", None)


def rows(**options):
    """Sequences with different numbers of labels; the first token of each is not predicted by anything."""
    found = tiny.data(padded=True, **options)
    for row in found:
        row["labels"][0] = -100
    return found


def train(kind, net, cls=hf_optim.LossAwareTrainer, arguments=tiny.arguments, collator=default_data_collator, **more):
    """A trainer after its run, and the batches that it drew."""
    batches = []

    def collate(examples):
        batches.append(dict(collator(examples)))
        return copy.deepcopy(batches[-1])

    extra = {key: more.pop(key) for key in ("train_dataset", "processing_class") if key in more}
    text = ",".join(f"{key}={value}" for key, value in OPTIONS[kind].items()) or None
    args = arguments(
        optim=kind, optim_args=text, learning_rate=LR, lr_scheduler_type="constant", max_steps=STEPS,
        gradient_accumulation_steps=PIECES, per_device_train_batch_size=4, **more,
    )  # fmt: skip
    run = cls(net, args, **{"train_dataset": rows(), **extra, "data_collator": collate})
    run.train()
    return run, batches


def check(run, net, batches, kind, part=mean_over_tokens, atol=0.0):
    """The run is the replay of its batches from `net`, which is a copy of the model as it was at the start."""
    losses, average = replay(net.train(), batches, kind, part=part)
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=2e-6) and len(logged) == STEPS
    for p, q in zip(run.model.parameters(), net.parameters()):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol if average is None else 3e-7)
    if average is not None:
        assert [float(group["e"]) for group in innermost(run.optimizer).param_groups] == pytest.approx(
            [average] * len(innermost(run.optimizer).param_groups), abs=1e-7
        )


# ---- peft ----------------------------------------------------------------------------------------------------------


def with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.0)
    return peft.get_peft_model(tiny.model(), config)


@KINDS
def test_lora_trains_adapters_and_nothing_else(kind):
    net = with_adapters()
    start = copy.deepcopy(net)
    run, batches = train(kind, net)
    optimizer = innermost(run.optimizer)
    names = {id(p): name for name, p in net.named_parameters()}
    stepped = {names[id(p)] for p in optimizer.state}
    assert stepped == {name for name in names.values() if "lora_" in name} and len(stepped) == 8
    for (name, p), was in zip(net.named_parameters(), start.parameters()):
        assert torch.equal(p, was) is (name not in stepped), name
        assert "lora_B" not in name or not was.any()
    if kind == "muon":
        assert {group["rule"] for group in optimizer.param_groups if group["params"]} == {"adamw"}
    check(run, start, batches, kind)


def test_zero_initialised_adapters_move(name):
    net = with_adapters()
    optimizer = hf_optim.create(name, net, **brisk(name))
    batch = default_data_collator(rows(rows=4))
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(**batch).loss
        loss.backward()
        optimizer.step(loss=loss)
    ups = [p for key, p in net.named_parameters() if "lora_B" in key]
    assert len(ups) == 4 and all(p.abs().max() > 1e-5 and p.isfinite().all() for p in ups)


# ---- TRL -----------------------------------------------------------------------------------------------------------


def sft_arguments(**options):
    trl = pytest.importorskip("trl")
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    return trl.SFTConfig(
        tempfile.mkdtemp(), bf16=False, gradient_checkpointing=False, max_length=None, **fixed, **options
    )


def sft_data():
    """(dataset that is tokenized, a tokenizer that knows the ids)"""
    import datasets
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    table = [{key: value.tolist() for key, value in row.items()} for row in rows()]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0", unk_token="w0")
    return datasets.Dataset.from_list(table), tokenizer


def sft_model():
    """Without biases: that of a key has no gradient but rounding errors, which TRL's own loss makes in its own way."""
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=0, eos_token_id=0))


def train_sft(kind, cls):
    dataset, tokenizer = sft_data()
    net = sft_model()
    more = {"train_dataset": dataset, "processing_class": tokenizer}
    return train(kind, net, cls=cls, arguments=sft_arguments, collator=sft_collator(), **more)


def sft_collator():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=0)


@KINDS
def test_sft_trainer_with_the_mixin(kind):
    trl = pytest.importorskip("trl")
    mixed = type("Mixed", (hf_optim.LossAwareMixin, trl.SFTTrainer), {})
    run, batches = train_sft(kind, mixed)
    check(run, sft_model(), batches, kind, atol=1e-6)


# the trainer and its arguments know nothing of this package
SFT_SCRIPT = f"""
import json, sys
sys.path.append({str(Path(__file__).parent)!r})
import torch, trl
from test_neighbours import innermost, train_sft
run, _ = train_sft("adalo", trl.SFTTrainer)
torch.save([p.detach() for p in run.model.parameters()], sys.argv[1])
print(json.dumps([float(innermost(run.optimizer).param_groups[0]["e"]), run.state.log_history]))
"""


def test_sft_trainer_through_the_runner(tmp_path):
    trl = pytest.importorskip("trl")
    (tmp_path / "sft.py").write_text(SFT_SCRIPT)
    words = [sys.executable, "-m", "hf_optim.run", str(tmp_path / "sft.py"), str(tmp_path / "weights.pt")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    average, history = json.loads(done.stdout.splitlines()[-1])
    by_hand = 0.0
    for loss in [entry["loss"] for entry in history if "loss" in entry]:
        by_hand = 0.9 * by_hand + 0.1 / (2 + loss)
    assert average == pytest.approx(by_hand, abs=1e-7)
    mixed = type("Mixed", (hf_optim.LossAwareMixin, trl.SFTTrainer), {})
    run, _ = train_sft("adalo", mixed)
    for p, q in zip(tiny.weights(run), torch.load(tmp_path / "weights.pt")):
        assert torch.equal(p, q)


# ---- Seq2SeqTrainer ------------------------------------------------------------------------------------------------


def translator():
    set_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    net = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))
    net.accepts_loss_kwargs = False  # it takes the number of tokens and ignores it: Trainer would sum the pieces
    return net


def seq2seq_arguments(**options):
    given = tiny.arguments(**options)
    fields = {key: getattr(given, key) for key in (*options, "report_to", "disable_tqdm", "use_cpu", "save_strategy")}
    return Seq2SeqTrainingArguments(given.output_dir, **{**fields, "logging_steps": 1})


@KINDS
def test_seq2seq_trainer(kind):
    mixed = type("Mixed", (hf_optim.LossAwareMixin, Seq2SeqTrainer), {})
    run, batches = train(kind, translator(), cls=mixed, arguments=seq2seq_arguments)
    check(run, translator(), batches, kind, part=mean_over_pieces)


# ---- torch ---------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(kind, reentrant):
    way = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run, batches = train(kind, tiny.model(), **way)
    assert run.model.transformer.h[0].gradient_checkpointing
    check(run, tiny.model(), batches, kind)


@KINDS
def test_checkpointing_of_a_shared_layer_under_gradient_release(kind):
    def run(released, **way):
        net = tiny.model().train()
        net.transformer.h[1] = net.transformer.h[0]
        if way:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs=way)
        optimizer = hf_optim.create(kind, net, lr=LR, **OPTIONS[kind])
        if released:
            optimizer.release_gradients()
        for t in range(3):
            loss = net(**default_data_collator(rows(rows=4, seed=t)), use_cache=False).loss
            optimizer.zero_grad()
            optimizer.report_loss(loss_at(t + 1))
            loss.backward()
            optimizer.step()
        return everything(optimizer)

    expected = run(False)
    assert run(True) == run(True, use_reentrant=False) == run(False, use_reentrant=True) == expected
    with pytest.raises(RuntimeError, match="a second gradient arrived(.|\n)*use_reentrant=False"):
        run(True, use_reentrant=True)


@KINDS
def test_a_compiled_model(kind):
    run, batches = train(kind, tiny.model(), torch_compile=True, torch_compile_backend="eager")
    check(run, tiny.model(), batches, kind)
    made = [hf_optim.create(kind, net) for net in (tiny.model(), torch.compile(tiny.model(), backend="eager"))]
    kinds = [[(group.get("rule"), len(group["params"])) for group in optimizer.param_groups] for optimizer in made]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("report", [False, True])
@KINDS
def test_a_compiled_training_step(kind, report):
    def run(compiled):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 4))
        optimizer, x = hf_optim.create(kind, net), torch.randn(8, 16)

        def step():
            loss = net(x).square().mean()
            loss.backward()
            if report:
                optimizer.report_loss(loss.detach())
            optimizer.step(**({} if report else {"loss": loss.detach()}))
            optimizer.zero_grad()

        step, before = torch.compile(step, backend="eager") if compiled else step, net[0].weight.clone()
        for _ in range(3):
            step()
        assert (net[0].weight != before).any()
        return everything(optimizer)

    assert run(True) == run(False)


# ---- accelerate without Trainer ------------------------------------------------------------------------------------

SCHEDULES = {  # a scheduler, and the factor of its learning rate at step t = 0, 1, ...
    "linear": (
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
        lambda t: 1 / (1 + t),
    ),
    "exponential": (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), lambda t: 0.5**t),
    "constant": (
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.25, 2),
        lambda t: (0.25, 0.25, 1)[t],
    ),
}


@KINDS
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_accelerate_loop_with_a_scheduler(kind, schedule):
    make, factor = SCHEDULES[schedule]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PIECES)
    deliver_loss(accelerator)
    net = tiny.model()
    follow = {"follow_schedule": True} if kind == "adalo" else {}
    optimizer = hf_optim.create(kind, net, lr=LR, **OPTIONS[kind], **follow)
    examples = tiny.data(rows=STEPS * PIECES * 4)  # as many labels in every batch: accelerate takes the mean
    batches = [default_data_collator(examples[i : i + 4]) for i in range(0, len(examples), 4)]
    loader = torch.utils.data.DataLoader(examples, batch_size=4, collate_fn=default_data_collator)
    net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, make(optimizer))
    for i, batch in enumerate(loader):
        for group in innermost(optimizer).param_groups:
            assert group["lr"] == pytest.approx(LR * factor(i // PIECES))
        with accelerator.accumulate(net):
            accelerator.backward(net(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    reference = tiny.model().train()
    factors = [factor(t) for t in range(STEPS)]
    _, average = replay(reference, batches, kind, factors, mean_over_pieces)
    for p, q in zip(net.parameters(), reference.parameters()):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=0 if average is None else 3e-7)
    if average is not None:
        assert float(innermost(optimizer).param_groups[0]["e"]) == pytest.approx(average, abs=1e-7)
