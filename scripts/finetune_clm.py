# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a causal language model, with any optimizer of transformers or hf_optim.

    python scripts/finetune_clm.py configs/train/clm_muon.yaml
    python scripts/finetune_clm.py --optim adalo --optim_args "kappa=1.0" --do_train --do_eval \\
        --max_steps 200 --output_dir outputs/clm

Without `--model_name_or_path` a small Llama and its tokenizer are made from scratch. The default text is the tiny
Shakespeare of `scripts/data`: nothing is downloaded.
"""

import logging
import math
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import transformers
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_optim
from hf_optim.losses import LOSSES, create_loss, split_loss_args


logger = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data" / "shakespeare"
VOCAB_SIZE = 2048


@dataclass
class ModelArguments:
    """Which model to train, and with which loss."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a pretrained causal LM. Default: a new small Llama and tokenizer."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    loss: str | None = field(
        default=None,
        metadata={"help": f"Loss to train with: {', '.join(LOSSES)}. Default: that of the model."},
    )
    loss_args: str | None = field(
        default=None, metadata={"help": 'Options of the loss, written like those of `--optim_args`: "tau=0.2".'}
    )


@dataclass
class DataTrainingArguments:
    """Which text to train on."""

    train_file: str = field(default=str(DATA / "train.txt"), metadata={"help": "The training text."})
    validation_file: str = field(default=str(DATA / "validation.txt"), metadata={"help": "The validation text."})
    block_size: int = field(default=64, metadata={"help": "Tokens per example."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first examples to train."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first examples to evaluate."})


def new_tokenizer(texts) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: any text makes the round trip, no unknown token is needed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def new_config(tokenizer: PreTrainedTokenizerFast, block_size: int) -> LlamaConfig:
    """A Llama of 1.1 M parameters, small enough for two CPU cores."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=block_size,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_trainer(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> Trainer:
    """Loads or makes model and tokenizer, cuts the text into blocks and returns the trainer, ready to train."""
    set_seed(training_args.seed)  # a new model is drawn below
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw_datasets = load_dataset("text", data_files=files, keep_linebreaks=True)

    if model_args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype)
    else:
        tokenizer = new_tokenizer(raw_datasets["train"]["text"])
        config = new_config(tokenizer, data_args.block_size)
        model = AutoModelForCausalLM.from_config(config, dtype=model_args.dtype)

    def group_texts(examples):
        ids = list(chain.from_iterable(tokenizer(examples["text"], add_special_tokens=False)["input_ids"]))
        size = data_args.block_size
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    with training_args.main_process_first(desc="grouping texts together"):
        datasets = raw_datasets.map(group_texts, batched=True, remove_columns=["text"])
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None:
            datasets[split] = datasets[split].select(range(min(limit, len(datasets[split]))))

    if model_args.loss_args and not model_args.loss:
        raise ValueError(f"`--loss_args` ({model_args.loss_args!r}) needs `--loss`: one of {', '.join(LOSSES)}.")
    loss = None
    if model_args.loss:
        loss = create_loss(model_args.loss, model, **split_loss_args(model_args.loss_args))

    return hf_optim.LossAwareTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_loss_func=loss,
        callbacks=[loss] if loss else None,
    )


def main():
    hf_optim.register()  # before the parser: `--optim` is checked while the arguments are parsed
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(sys.argv[1])
    elif len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        model_args, data_args, training_args = parser.parse_yaml_file(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.info(f"Training/evaluation parameters {training_args}")

    trainer = build_trainer(model_args, data_args, training_args)

    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        metrics = {**train_result.metrics, "train_samples": len(trainer.train_dataset)}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = {**trainer.evaluate(), "eval_samples": len(trainer.eval_dataset)}
        try:
            metrics["perplexity"] = math.exp(metrics["eval_loss"])
        except OverflowError:
            metrics["perplexity"] = float("inf")
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation", "tags": "hf_optim"}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.end_training()  # gloo's threads must end before Python does, or the process may abort


if __name__ == "__main__":
    main()
