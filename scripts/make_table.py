# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of the README: `python scripts/make_table.py [--check]`.

The optimizers come from the registry, the comparison from `scripts/results/results.json`: what
`python scripts/bootstrap.py demo --output_dir scripts/results` wrote. `python scripts/compare_precision.py` wrote
`scripts/results/precision.json`.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import hf_optim
from hf_optim.core import FLAGS, STAGES


ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "scripts" / "results" / "results.json"
SHARDING = RESULTS.with_name("sharding.json")  # by scripts/compare_sharding.py
STEPS = ("gpt2", "lora", "small")  # by scripts/bench_step.py
TESTS = RESULTS.with_name("tests.json")  # by scripts/count_tests.py
PRECISION = RESULTS.with_name("precision.json")  # by scripts/compare_precision.py


def optimizers() -> str:
    """One row per registered optimizer."""
    head = "| `--optim` | what it is | state, bytes per parameter | `learning_rate` | paper |"
    rows = [head, "|---|---|---|---|---|"]
    for name in hf_optim.list_optimizers():
        info = hf_optim.info(name)
        rate = f"{info.lr[1]:g} ({info.lr[0]:g} to {info.lr[2]:g})" if info.lr else "plays no part"
        summary = info.summary + ("; needs the loss" if info.needs_loss else "")
        label = info.paper if info.paper.startswith("doi:") else f"arXiv {info.paper}"
        rows.append(f"| `{name}` | {summary} | {info.bytes_per_parameter:.3g} | {rate} | [{label}]({info.link}) |")
    return "\n".join(rows)


def flags() -> str:
    """One row per technique, stage by stage."""
    rows = ["| flag | stage | what it does | paper |", "|---|---|---|---|"]
    members = [m for of_flag in FLAGS.values() for m in of_flag.values()]
    for member in sorted(members, key=lambda m: STAGES.index(m.stage)):
        value = "true" if member.value is True else member.value
        papers = re.findall(r"https://huggingface.co/papers/([\d.]*\d)", member.__doc__)
        links = ", ".join(f"[{paper}](https://huggingface.co/papers/{paper})" for paper in papers)
        summary = member.__doc__.splitlines()[0].rstrip(".:")
        rows.append(f"| `{member.flag}={value}` | {member.stage} | {summary} | {links} |")
    return "\n".join(rows)


def comparison() -> str:
    """What the demo printed when its results were committed."""
    record = json.loads(RESULTS.read_text())
    rows = [
        "| optimizer | accuracy | eval loss | state, bytes per parameter | ms per optimizer step |",
        "|---|---|---|---|---|",
    ]
    for r in record["results"]:
        settings = ", ".join(f"{k}={v}" if k == "learning_rate" else v for k, v in r["hyperparameters"].items())
        rows.append(
            f"| `{r['optim']}` ({settings}) | {r['accuracy']:.1%} | {r['eval_loss']:.3f} | "
            f"{r['state_bytes'] / r['parameters']:.3f} | {1e3 * r['optimizer_step_seconds']:.0f} |"
        )
    eval_rows = record["results"][0]["eval_rows"]
    rows += ["", f"One seed, {eval_rows:,} texts; {record['date']}, {record['machine']}, torch {record['torch']}."]
    return "\n".join(rows)


NOTABLE = {  # those that people reach for to save memory, or to replace Adam
    "torch.optim": ("AdamW", "Adafactor", "Muon"),
    "transformers": ("Adafactor",),
    "pytorch_optimizer": ("adafactor", "came", "lamb", "lion", "muon", "prodigy", "scheduleFreeAdamW", "sm3", "soap"),
}


def sharding() -> str:
    """Who takes the same steps on shards: a count for each package, and the optimizers that people know."""
    record = json.loads(SHARDING.read_text())
    rows = ["| optimizer | steps on FSDP2 shards | collectives per matrix |", "|---|---|---|"]
    packages: dict[str, list] = {}
    for r in record["results"]:
        if "unusable" not in r:
            packages.setdefault(r["package"], []).append(r)
    for package, found in packages.items():
        fine = [r for r in found if r.get("difference", math.inf) <= record["tolerance"]]
        counts = [r["collectives_per_matrix"] for r in fine]
        span = f"{min(counts):g} to {max(counts):g}" if counts else ""
        joined = [r["compiled_per_matrix"] for r in fine if "compiled_per_matrix" in r]
        if joined:
            span += f" (compiled, of 8 alike: {min(joined):g} to {max(joined):g})"
        rows.append(f"| {package}, all usable | {len(fine)} of {len(found)} right | {span} |")
        known = {name.lower() for name in NOTABLE.get(package, ())}
        for r in (r for r in found if r["name"].lower() in known):
            right = "right" if r in fine else "wrong without a word" if "difference" in r else "error"
            options = f" ({r['options']})" if "options" in r else ""
            counted = f"{r['collectives_per_matrix']:g}" if r in fine else ""
            rows.append(f"| `{r['name']}` of {package}{options} | {right} | {counted} |")
    versions = f"torch {record['torch']}, transformers {record['transformers']}"
    if "pytorch_optimizer" in record:
        versions += f", pytorch_optimizer {record['pytorch_optimizer']}"
    rows += [
        "",
        f"{record['steps']} steps on {record['ranks']} processes; {record['date']}, {record['machine']}, {versions}.",
    ]
    return "\n".join(rows)


def precision() -> str:
    """What bf16 weights cost in loss, for each way of rounding them."""
    record = json.loads(PRECISION.read_text())
    rows = [
        "| optimizer | weights | settings | weights and state, bytes per parameter | eval loss | minus fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for arm in record["arms"]:
        loss, minus = (f"{of['mean']:.3f} ± {of['sd']:.3f}" for of in (arm["eval_loss"], arm["eval_loss_minus_fp32"]))
        settings = f"`{arm['settings']}`" if arm["settings"] else ""
        rows.append(
            f"| `{arm['optim']}` | {arm['dtype']} | {settings} | {arm['bytes_per_parameter']:.2f} | {loss} | "
            f"{'' if arm['dtype'] == 'float32' else minus} |"
        )
    rows += [
        "",
        f"Mean ± standard deviation over {record['seeds']} seeds, {record['steps']} steps; {record['date']}, "
        f"{record['machine']}, torch {record['torch']}.",
    ]
    return "\n".join(rows)


def speed() -> str:
    """Steps against fused AdamW, on the parameters of a model, on those of LoRA and on tiny ones."""
    whole, lora, small = (json.loads((RESULTS.parent / f"step_{of}_float32_cpu.json").read_text()) for of in STEPS)
    rows = [
        "| optimizer | GPT-2 small, x fused AdamW | LoRA, x fused AdamW | (4, 4) tensor, us | GPT-2 small, x bytes | "
        "extra bytes per parameter | first step, CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(whole["optimizers"], key=lambda name: whole["optimizers"][name]["ratio"]):
        a, b, c = (of["optimizers"][name] for of in (whole, lora, small))
        extra, first = (max(x[key] for x in (a, b)) for key in ("extra_bytes", "first_seconds"))
        rows.append(
            f"| `{name}` | {a['ratio']:.2f} | {b['ratio']:.2f} | {c['us_per_tensor']:.1f} | {a['times_bytes']:.1f} | "
            f"{extra:.3f} | {first:.0f} |"
        )
    fused = statistics.median(of["us_per_tensor"] / of["ratio"] for of in small["optimizers"].values())
    rows += [
        "",
        f"A (4, 4) tensor takes fused AdamW {fused:.1f} us. fp32, {whole['threads']} thread, medians over steps, in "
        f"{whole['processes']} fresh process(es); {whole['date']}, {whole['device']}, torch {whole['torch']}.",
    ]
    return "\n".join(rows)


def tests() -> str:
    """What test runs have shown, subject by subject."""
    record = json.loads(TESTS.read_text())
    rows = ["| what | passed | failed | skipped | `tests/` |", "|---|---|---|---|---|"]
    for r in record["subjects"]:
        files = ", ".join(f"`test_{file}.py`" for file in r["files"])
        rows.append(f"| {r['subject']} | {r['passed']:,} | {r['failed']} | {r['skipped']} | {files} |")
    rows += ["", f"{record['date']}, {record['machine']}, torch {record['torch']}."]
    return "\n".join(rows)


def rounding() -> str:
    """What the ways to round bf16 weights cost in time."""
    ways = ("nearest", "stochastic", "kahan")
    stem = "step_gpt2_bfloat16_cpu_precision-{}.json"
    records = {way: json.loads((RESULTS.parent / stem.format(way)).read_text()) for way in ways}
    rows = ["| optimizer | nearest, x fused AdamW | stochastic / nearest | Kahan / nearest |", "|---|---|---|---|"]
    for name in records["nearest"]["optimizers"]:
        base, *others = (records[way]["optimizers"][name]["ratio"] for way in ways)
        rows.append(f"| `{name}` | " + " | ".join(f"{x:.2f}" for x in (base, *(y / base for y in others))) + " |")
    last = records["nearest"]
    rows += [
        "",
        f"bf16 weights, fp32 state, GPT-2 small, {last['threads']} thread, in {last['processes']} fresh process(es); "
        f"{last['date']}, {last['device']}, torch {last['torch']}.",
    ]
    return "\n".join(rows)


TABLES = {
    "optimizers": optimizers,
    "flags": flags,
    "comparison": comparison,
    "precision": precision,
    "sharding": sharding,
    "speed": speed,
    "rounding": rounding,
    "tests": tests,
}


def with_tables(text: str) -> str:
    """The README with each table between its two markers."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name}: start, by scripts/make_table.py -->", f"<!-- {name}: end -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{make()}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    old = README.read_text()
    new = with_tables(old)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: run `python scripts/make_table.py`" if old != new else 0)
    README.write_text(new)
