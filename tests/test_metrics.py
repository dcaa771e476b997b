# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys

import numpy as np
import pytest


pytest.importorskip("evaluate")  # a machine that measures steps can do without

from hf_optim.metrics import Accuracy  # noqa: E402


@pytest.fixture
def accuracy():
    return Accuracy(keep_in_memory=True)


def test_agrees_with_a_hand_count(accuracy):
    # right at positions 0, 2 and 5
    assert accuracy.compute(predictions=[3, 1, 2, 0, 0, 7], references=[3, 2, 2, 1, 4, 7]) == {"accuracy": 0.5}


@pytest.mark.parametrize("wrong, expected", [(0, 1.0), (1, 0.9), (10, 0.0)])
def test_counts_every_wrong_answer(accuracy, wrong, expected):
    references = np.arange(10)
    predictions = np.where(np.arange(10) < wrong, references + 1, references)
    assert accuracy.compute(predictions=predictions, references=references)["accuracy"] == pytest.approx(expected)


def test_add_batch_weighs_examples_not_batches(accuracy):
    accuracy.add_batch(predictions=[1, 1, 1], references=[1, 1, 1])
    accuracy.add_batch(predictions=[0], references=[1])
    assert accuracy.compute() == {"accuracy": 0.75}


def test_a_second_compute_starts_afresh(accuracy):
    accuracy.compute(predictions=[0, 0], references=[1, 1])
    assert accuracy.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}


def test_refuses_different_lengths(accuracy):
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        accuracy.compute(predictions=[0, 1, 1], references=[0, 1])


def test_works_without_the_hub_and_scikit_learn(tmp_path):
    # A process of its own: `HF_HUB_OFFLINE` is read once, at import. HF_HOME is empty, so no cached module can help.
    code = """
import sys
sys.modules["sklearn"] = None
from hf_optim.metrics import Accuracy
print(Accuracy().compute(predictions=[1, 2], references=[1, 3]))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "{'accuracy': 0.5}"
