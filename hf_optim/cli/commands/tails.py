# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`hf-optim tails RUN_DIR`."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer


KINDS = {"parameter": "tab:green", "gradient": "tab:blue", "update": "tab:orange"}  # of GradientTails, with colours
NORMAL = {"kurtosis": 3.0, "top1_share": 0.0845}  # of a normal distribution
TITLES = {"kurtosis": "kurtosis  E x⁴ / (E x²)²", "top1_share": "share of the squared norm\nin the top 1 % of entries"}
MOST = 100  # rows that still make an image that viewers open

Runs = list[dict[str, dict[str, list[Any]]]]  # per event folder: histograms, scalars -> tag -> events


def tails(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run; event files are looked for below it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Image to write: .png, .pdf or .svg.")],
    kind: Annotated[str, typer.Option(help="What to show the distribution of: parameter, gradient or update.")] = (
        "gradient"
    ),
    group: Annotated[str, typer.Option(help="Shell pattern of the groups to draw, such as '*.self_attn'.")] = "*",
) -> None:
    """Draw what hf_optim.GradientTails recorded in TensorBoard's event files."""
    from ..errors import UserError

    if kind not in KINDS:
        raise UserError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}")
    histograms, scalars = _merge(_recorded(run_dir))
    known = list(dict.fromkeys(tag.split("/", 2)[2] for tag in histograms))  # in the order of the model
    groups = fnmatch.filter(known, group)
    if not groups:
        raise UserError(f"no group matches {group!r}; recorded are {', '.join(known)}")
    if len(groups) > MOST:
        raise UserError(f"{len(groups)} groups do not fit into one image, {MOST} do; choose some by --group PATTERN")
    try:
        _draw(groups, kind, histograms, scalars).savefig(output)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise UserError(f"cannot write {output}: {error}") from None
    typer.echo(f"{output}: {len(groups)} groups")


def _recorded(run_dir: Path) -> Runs:
    """Our events in each folder below `run_dir` that holds any, oldest first."""
    from ..errors import UserError

    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise UserError('reading event files needs TensorBoard: pip install "hf-optim[tensorboard]"') from None
    folders = sorted({file.parent for file in run_dir.rglob("*tfevents*")})
    if not folders:
        raise UserError(f"no event files below {run_dir}; train with `--report_to tensorboard`")
    found, where = [], []
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0}).Reload()
        tags = {kind: [tag for tag in events.Tags()[kind] if tag.startswith("tails/")] for kind in _READ}
        if tags["histograms"]:
            found.append({kind: {tag: read(events, tag) for tag in tags[kind]} for kind, read in _READ.items()})
            where.append(folder)
    if not found:
        raise UserError(f"no event file below {run_dir} has tails/...; train with the callback hf_optim.GradientTails")
    order = sorted(range(len(found)), key=lambda i: _began(found[i]).wall_time)
    begins = [_began(found[i]).step for i in order]
    if any(later <= earlier for earlier, later in zip(begins, begins[1:])):
        raise UserError(f"{run_dir} holds several runs; name one of {', '.join(map(str, where))}")
    return [found[i] for i in order]


_READ = {
    "histograms": lambda events, tag: events.Histograms(tag),
    "scalars": lambda events, tag: events.Scalars(tag),
}


def _began(run: dict[str, dict[str, list[Any]]]) -> Any:
    return min((events[0] for events in run["histograms"].values()), key=lambda event: event.step)


def _merge(runs: Runs) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """A run that was resumed, once or more, as one: where steps were repeated, the later ones count."""
    merged = []
    for kind in _READ:
        by_tag: dict[str, dict[int, Any]] = {}
        for run in runs:
            for tag, events in run[kind].items():
                by_tag.setdefault(tag, {}).update({event.step: event for event in events})
        merged.append({tag: [events[step] for step in sorted(events)] for tag, events in by_tag.items()})
    return merged[0], merged[1]


def _draw(groups: list[str], kind: str, histograms: dict[str, list[Any]], scalars: dict[str, list[Any]]) -> Any:
    from ..errors import UserError

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('drawing needs matplotlib: pip install "hf-optim[plot]"') from None
    height = 1.7 * len(groups) + 1.2
    figure = Figure(figsize=(13, height), dpi=100, layout="constrained")
    axes = figure.subplots(len(groups), 3, sharex=True, sharey="col", squeeze=False, width_ratios=(5, 4, 4))
    image = None
    for row, group in zip(axes, groups):
        image = _distribution(row[0], histograms.get(f"tails/{kind}/{group}", [])) or image
        row[0].set_title(group, fontsize=10, loc="left")
        for panel, measure in zip(row[1:], NORMAL):
            _curves(panel, measure, group, scalars)
    for panel, measure in zip(axes[0, 1:], NORMAL):
        panel.set_title(TITLES[measure], fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("optimizer step")
    if image is not None:
        size = min(1.0, 4 / height)
        bar = figure.colorbar(image, ax=axes[:, 0], location="left", shrink=size, anchor=(0.0, 1.0), pad=0.03)
        bar.set_label(f"share of the {kind}'s entries\nper octave of |x|")
    _legends(figure, kind)
    return figure


def _legends(figure: Any, kind: str) -> None:
    from matplotlib.lines import Line2D

    curves = [Line2D([], [], color=colour, label=name) for name, colour in KINDS.items()]
    curves.append(Line2D([], [], color="grey", linestyle=":", label="normal distribution"))
    figure.legend(handles=curves, loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    lines = [("lightgrey", "root mean square"), ("tab:red", "99th percentile")]
    handles = [Line2D([], [], color=colour, label=f"{name} of |{kind}|") for colour, name in lines]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=9, frameon=False)


def _distribution(panel: Any, events: list[Any]) -> Any:
    """A column per recorded step, a row per octave of |x|; lines for the root mean square and the 99th percentile."""
    import numpy as np
    from matplotlib.colors import LogNorm

    panel.set_ylabel("|x|")
    panel.set_yscale("log")
    columns = [_octaves(event.histogram_value) for event in events]
    occupied = [octave for column in columns for octave in column]
    if not occupied:
        text = "all entries are zero" if events else "not recorded"
        panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center")
        return None
    # down to where a ten thousandth of the entries lies; of large ones every single entry is drawn
    first = min((o for column in columns for o, share in column.items() if share >= 1e-4), default=min(occupied))
    rows = range(first, max(occupied) + 1)
    shares = np.ma.masked_equal([[column.get(octave, 0.0) for column in columns] for octave in rows], 0.0)
    steps = np.array([event.step for event in events], dtype=float)
    edges = 2.0 ** np.arange(rows[0] - 1, rows[-1] + 1)
    image = panel.pcolormesh(_around(steps), edges, shares, norm=LogNorm(1e-6, 1.0), cmap="viridis", rasterized=True)
    lines = np.array([_rms_and_percentile(event.histogram_value) for event in events])
    lines[lines < edges[0]] = np.nan
    panel.plot(steps, lines[:, 0], color="white", linewidth=1.5)
    panel.plot(steps, lines[:, 1], color="tab:red", linewidth=1.5)
    return image


def _bins(histogram: Any) -> tuple[Any, Any, Any]:
    """Inner and outer edge of |x|, and count, of each bin; the inner edge is 0 for the bin around zero."""
    import numpy as np

    upper = np.array(histogram.bucket_limit)
    lower = np.append(histogram.min, upper[:-1])
    outer = np.maximum(np.abs(lower), np.abs(upper))
    inner = np.where(lower * upper < 0, 0.0, np.minimum(np.abs(lower), np.abs(upper)))
    return inner, outer, np.array(histogram.bucket)


def _octaves(histogram: Any) -> dict[int, float]:
    """Share of the entries with 2^(i - 1) <= |x| < 2^i, for every i with any."""
    import numpy as np

    inner, outer, counts = _bins(histogram)
    seen = (inner > 0) & (counts > 0)
    octaves, position = np.unique(np.ceil(np.log2(outer[seen])).astype(int), return_inverse=True)
    return dict(zip(octaves.tolist(), np.bincount(position, weights=counts[seen] / histogram.num).tolist()))


def _rms_and_percentile(histogram: Any) -> tuple[float, float]:
    import numpy as np

    _, outer, counts = _bins(histogram)
    order = np.argsort(outer)
    cut = np.searchsorted(counts[order].cumsum(), 0.99 * histogram.num)
    return (histogram.sum_squares / histogram.num) ** 0.5, outer[order][cut]


def _around(steps: Any) -> Any:
    """Edges of the columns: halfway between steps."""
    import numpy as np

    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _curves(panel: Any, measure: str, group: str, scalars: dict[str, list[Any]]) -> None:
    for kind, colour in KINDS.items():
        events = scalars.get(f"tails/{kind}_{measure}/{group}", [])
        marker = "." if len(events) < 30 else None
        panel.plot([e.step for e in events], [e.value for e in events], color=colour, marker=marker, linewidth=1.3)
    panel.axhline(NORMAL[measure], color="grey", linestyle=":", linewidth=1)
    if measure == "kurtosis":
        panel.set_yscale("log")
    else:
        panel.set_ylim(0, 1)
    panel.grid(alpha=0.3)
