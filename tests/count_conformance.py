# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How many checks of the ordinary run every registered name passes, and which do not apply to it.

A check is a test function that takes the fixture `name`; its further parameters are not counted. One that may stop
before its assertions for some names stands in NOT_APPLICABLE, with the reason and for whom; tests compare that table
with the code. Run `python tests/count_conformance.py`.
"""

import ast
import json
from functools import cache
from pathlib import Path

import oracles

import hf_optim


HERE = Path(__file__).parent
GENERIC = ("conformance", "conformance_more", "options", "precision", "release", "compile", "oracles", "sharding")
GENERIC += ("hazards", "hazards_adam", "hazards_flags", "trainer")  # not: pages, command line and verdict tables


NOT_APPLICABLE = {  # check -> (reason, whether it holds for a name)
    "test_keys_of_checkpoints_are_frozen": (
        "not released yet, so its keys may change",
        lambda name: name not in json.loads((HERE / "data" / "keys.json").read_text()),
    ),
    "test_the_transpose_of_a_matrix_is_stepped_alike": (
        "rows and columns differ by its definition",
        lambda name: getattr(oracles.load(name), "TRANSPOSE", {}) is None,
    ),
    "test_amsgrad_acts_or_is_refused": (
        "the rule has no such option",
        lambda name: "amsgrad" not in hf_optim.info(name).options,
    ),
}
BRANCHES = {  # these end early only after an assertion: the other outcome that is asked for
    "test_softplus_works_on_every_rule_with_a_ratio": "refused by name where there is no ratio",
    "test_checkpointing": "reentrant checkpointing is refused by name",
    "test_fuzz": "draws again where a combination is refused by name",
}


@cache
def functions():
    """{name of a check: its syntax tree}, without those that the ordinary run leaves out."""
    found = {}
    for part in GENERIC:
        tree = ast.parse((HERE / f"test_{part}.py").read_text())
        for node in tree.body:
            takes = isinstance(node, ast.FunctionDef) and "name" in {arg.arg for arg in node.args.args}
            if takes and node.name.startswith("test_") and not _marked(node):
                found[node.name] = node
    return found


def _marked(node):
    return any(mark in ast.unparse(d) for d in node.decorator_list for mark in ("mark.slow", "mark.gpu", "mark.skip"))


def stops(node):
    """Whether a test function can end before its last line without having failed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda)):
            continue
        call = ast.unparse(child.func) if isinstance(child, ast.Call) else ""
        if isinstance(child, ast.Return) or call in ("pytest.skip", "reject") or stops(child):
            return True
    return False


def not_applicable(name):
    """{check: reason} for a registered name."""
    return {check: reason for check, (reason, holds) in NOT_APPLICABLE.items() if check in functions() and holds(name)}


def applicable(name):
    """The checks that say something about a registered name."""
    return sorted(set(functions()) - set(not_applicable(name)))


def main():
    for name in hf_optim.list_optimizers():
        reasons = not_applicable(name)
        print(f"{name:22} {len(applicable(name))} checks, {len(reasons)} not applicable")
        for check, reason in reasons.items():
            print(f"{'':22}   {check}: {reason}")


if __name__ == "__main__":
    main()
