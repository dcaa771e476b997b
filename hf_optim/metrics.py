# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Metrics for the scripts. `evaluate.load("accuracy")` needs the Hub and scikit-learn, these need neither."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """
    The share of predictions that equal their reference.

    Example:

    ```python
    >>> from hf_optim.metrics import Accuracy

    >>> Accuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 1])
    {'accuracy': 0.5}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference.",
            citation="",
            inputs_description="""
Args:
    predictions (`list` of `int`): The predicted class of each example.
    references (`list` of `int`): The true class of each example.

Returns:
    `dict` with the key `accuracy`, a `float` between 0 and 1.
""",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((predictions == references).mean())}
