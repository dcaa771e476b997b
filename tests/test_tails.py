# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""GradientTails: its figures against float64, its event files read by TensorBoard, on one rank and several."""

import gc
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from typer.testing import CliRunner

import hf_optim
from hf_optim.cli.commands import tails as command
from hf_optim.cli.errors import UserError
from hf_optim.cli.main import app
from hf_optim.trainer import callbacks
from hf_optim.trainer.callbacks import GradientTails
from hf_optim.trainer.tails import CHUNK, group_names, group_of, read, tally


@pytest.fixture(autouse=True, scope="module")
def registered():
    hf_optim.register()


# ---- figures of one tensor -----------------------------------------------------------------------------------------


def drawn(n=5000, seed=0):
    """Entries of both signs from 1e-44 to 3e38, zeros of both signs, and edges of bins."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.0, 1.0], n) * 10.0 ** rng.uniform(-44, 38.4, n)
    special = [0.0, -0.0, 1.0, -1.0, 1.25, -1.5, 1.75, 2.0**-126, -(2.0**-126), 2.0**-127, 2.0**-149, 3e38, -3e38]
    return torch.tensor(np.concatenate([values, special]))


def counted(x, low, high):
    """How many entries lie in a bin: the edge nearer to zero belongs to it, the bin around zero is open."""
    if low < 0 < high:
        return int(((x > low) & (x < high)).sum())
    return int(((x >= low) & (x < high)).sum() if low > 0 else ((x > low) & (x <= high)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_counts_are_those_of_numpy(dtype):
    x = drawn().float().to(dtype)
    x = x[x.isfinite()]
    tail, exact = read(tally(x).numpy()), x.double().numpy()
    assert tail.counts.tolist() == [counted(exact, *edges) for edges in zip(tail.edges, tail.edges[1:])]
    assert tail.counts.sum() == len(exact) and tail.nonfinite == 0
    mantissas, _ = np.frexp(np.abs(tail.edges))
    assert set(mantissas.tolist()) == {0.5, 0.625, 0.75, 0.875}
    occupied = tail.counts > 0
    magnitudes = np.sort(np.abs([tail.edges[:-1], tail.edges[1:]]), axis=0)[:, occupied]
    assert (magnitudes[1] <= 1.25 * magnitudes[0]).all()


def test_bins_are_at_most_a_quarter_wide_and_empty_neighbours_are_joined():
    tail = read(tally(torch.tensor([-8.0, 1.1, 1.2, 100.0])).numpy())
    assert tail.edges.tolist() == [-10.0, -8.0, 1.0, 1.25, 96.0, 112.0]
    assert tail.counts.tolist() == [1, 0, 2, 0, 1]
    assert tail.sum == pytest.approx(94.3) and tail.squares == pytest.approx(64 + 1.21 + 1.44 + 10000)


def test_infinities_and_nan_are_counted_apart():
    x = torch.tensor([1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan, 0.0])
    tail, finite = read(tally(x).numpy()), read(tally(x[[0, 1, 6]]).numpy())
    assert tail.nonfinite == 4 and finite.nonfinite == 0
    assert (tail.kurtosis, tail.top_share, tail.sum) == (finite.kurtosis, finite.top_share, finite.sum)
    assert tail.counts.sum() == 3


def test_empty_and_zero_have_no_figures():
    for x in (torch.empty(0, 3), torch.zeros(7)):
        tail = read(tally(x).numpy())
        assert tail.kurtosis is None and tail.top_share is None and tail.counts.sum() == x.numel()


def exact_kurtosis(x):
    x = np.asarray(x, dtype=np.float64).ravel()
    return np.mean(x**4) / np.mean(x**2) ** 2


def exact_share(x):
    squares = np.sort(np.asarray(x, dtype=np.float64).ravel() ** 2)[::-1]
    return squares[: math.ceil(len(squares) / 100)].sum() / squares.sum()


DISTRIBUTIONS = {
    "normal": lambda rng: rng.standard_normal(20_001),
    "student": lambda rng: rng.standard_t(2, 20_001),
    "uniform": lambda rng: rng.uniform(-1, 1, 20_001),
    # 10 of the 22 entries of a bin are the top: as far above, and below, the middle as they can be
    "upper end": lambda rng: np.concatenate([np.full(10, 1.2421875), np.ones(12), np.zeros(978)]),
    "lower end": lambda rng: np.concatenate([np.full(22, 1.1171875), np.zeros(978)]),
    "one entry": lambda rng: np.eye(1, 5000)[0],
    "few": lambda rng: rng.standard_normal(7),
    "huge": lambda rng: 1e37 * rng.uniform(-1, 1, 3000),
    "tiny": lambda rng: 1e-36 * rng.standard_normal(3000),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", DISTRIBUTIONS)
def test_kurtosis_and_top_share_against_float64(which, dtype):
    x = torch.tensor(DISTRIBUTIONS[which](np.random.default_rng(1))).to(dtype)
    tail, x = read(tally(x).numpy()), x.double().numpy()
    assert tail.kurtosis == pytest.approx(exact_kurtosis(x), rel=1e-10)
    # the stated bound: 1/18 of the share of the bin that holds the 99th percentile
    cut = np.sort(np.abs(x))[::-1][math.ceil(len(x) / 100) - 1]
    mantissa, exponent = np.frexp(cut)
    low, width = np.ldexp(np.floor(mantissa * 8) / 8, exponent), np.ldexp(1 / 8, exponent)
    inside = (np.abs(x) >= low) & (np.abs(x) < low + width)
    bound = (x[inside] ** 2).sum() / (x**2).sum() / 18
    assert abs(tail.top_share - exact_share(x)) <= bound * (1 + 1e-9)
    assert bound < 0.02 or which not in ("normal", "student")


def test_kurtosis_is_about_zero():
    assert read(tally(torch.full((50,), 3.0)).numpy()).kurtosis == 1.0
    ones = torch.ones(100)
    ones[0] = 10.0
    assert read(tally(ones).numpy()).kurtosis == pytest.approx(1.0099e4 / 100 / 1.99**2, rel=1e-12)
    assert read(tally(ones).numpy()).top_share == pytest.approx(100 / 199, rel=1e-12)


# ---- groups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameter, block, layer, role",
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn", "model.layers.3",
         "model.layers.self_attn"),
        ("model.layers.10.mlp.experts.7.w1.weight", "model.layers.10.mlp", "model.layers.10", "model.layers.mlp"),
        ("_orig_mod.model.embed_tokens.weight", *["model.embed_tokens"] * 3),
        ("lm_head.weight", *["lm_head"] * 3),
        ("0.weight", "0", "0", "model"),
        ("scale", *["scale"] * 3),
    ],
)  # fmt: skip
def test_rule_of_groups(parameter, block, layer, role):
    assert [group_of(parameter, level) for level in ("block", "layer", "role")] == [block, layer, role]


def test_auto_takes_the_finest_level_that_fits():
    names = [f"h.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp", "ln_1", "ln_2")] + ["wte.weight"]
    assert len(set(group_names(names, "auto", 13))) == 13
    assert sorted(set(group_names(names, "auto", 12))) == ["h.0", "h.1", "h.2", "wte"]
    with pytest.raises(ValueError, match="makes 5 groups of the 13 parameters, more than max_groups=3"):
        group_names(names, "auto", 3)
    assert set(group_names(names, lambda name: name.split(".")[0], 2)) == {"h", "wte"}
    with pytest.raises(ValueError, match="group_by='block' makes 13 groups"):
        group_names(names, "block", 12)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": 1.5}, {"max_groups": True}, {"group_by": "depth"}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be .*, got {next(iter(wrong.values()))!r}"):
        GradientTails(**wrong)


# ---- in a Trainer --------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """A reporter that transformers does not know."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))

    def tails(self):
        return {step: logs for step, logs in self.logged if any(key.startswith("tails/") for key in logs)}


class Truth(TrainerCallback):
    """Copies of everything, and the exact figures."""

    def __init__(self):
        self.parameter, self.gradient, self.update = {}, {}, {}

    def _by_group(self, tensors):
        joined = {}
        for name, x in tensors.items():
            joined.setdefault(group_of(name, "block"), []).append(x.detach().double().flatten().numpy().copy())
        return {group: np.concatenate(pieces) for group, pieces in joined.items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named, step = dict(model.named_parameters()), state.global_step + 1
        self.parameter[step] = self._by_group(named)
        if all(p.grad is not None for p in named.values()):
            self.gradient[step] = self._by_group({name: p.grad for name, p in named.items()})

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        step = state.global_step + 1
        after = self._by_group(dict(model.named_parameters()))
        self.update[step] = {group: after[group] - before for group, before in self.parameter[step].items()}


def events(run):
    folders = {file.parent for file in Path(run.args.output_dir).rglob("*tfevents*")}
    assert len(folders) == 1  # TensorBoardCallback's own
    return EventAccumulator(str(folders.pop()), size_guidance={"histograms": 0, "scalars": 0}).Reload()


def trained(cls=Trainer, extra=None, reporters=(), **options):
    """(trainer, exact values) after a run with GradientTails every second step."""
    truth = Truth()
    made = [GradientTails(every=2), truth, *reporters]
    run = tiny.trainer(cls=cls, extra={"callbacks": made, **(extra or {})}, **options)
    run.train()
    return run, truth


@pytest.mark.parametrize("cls", [Trainer, hf_optim.LossAwareTrainer])
def test_event_files_hold_the_exact_figures(cls):
    run, truth = trained(
        cls, report_to="tensorboard", optim="adamw_torch", max_steps=5, gradient_accumulation_steps=2,
        max_grad_norm=0.1,
    )  # fmt: skip
    seen = events(run)
    groups = truth.parameter[2]
    kinds = {kind: getattr(truth, kind) for kind in ("parameter", "gradient", "update")}
    measures = {"kurtosis": (exact_kurtosis, 1e-5), "top1_share": (exact_share, None)}
    tags = seen.Tags()
    assert {t for t in tags["histograms"]} == {f"tails/{kind}/{group}" for kind in kinds for group in groups}
    found = {t for t in tags["scalars"] if t.startswith("tails/")}
    assert found <= {f"tails/{kind}_{m}/{group}" for kind in kinds for m in measures for group in groups}
    for kind, by_step in kinds.items():
        for group in groups:
            histograms = seen.Histograms(f"tails/{kind}/{group}")
            assert [h.step for h in histograms] == [2, 4]
            for h in histograms:
                x, value = by_step[h.step][group], h.histogram_value
                edges = [value.min, *value.bucket_limit]
                assert list(value.bucket) == [counted(x, *pair) for pair in zip(edges, edges[1:])]
                assert value.num == len(x) and value.sum_squares == pytest.approx((x**2).sum())
            if all((by_step[step][group] != 0).any() for step in (2, 4)):
                for measure, (exact, tolerance) in measures.items():
                    values = seen.Scalars(f"tails/{kind}_{measure}/{group}")
                    assert [s.step for s in values] == [2, 4]
                    for s in values:  # fp32 in the file
                        figure = exact(by_step[s.step][group])
                        assert s.value == pytest.approx(figure, rel=tolerance, abs=None if tolerance else 1 / 18)
    norm = math.sqrt(sum((x**2).sum() for x in truth.gradient[2].values()))
    assert norm == pytest.approx(0.1, rel=1e-3)  # clipped


def test_scalars_reach_every_reporter_and_not_the_screen(capsys):
    before, after = Reporter(), Reporter()
    run = tiny.trainer(cls=Trainer, extra={"callbacks": [before]})
    run.add_callback(GradientTails(every=2))
    run.add_callback(type("Later", (Reporter,), {})())
    run.callback_handler.callbacks[-1].logged = after.logged
    run.train()
    assert sorted(before.tails()) == [2, 4] and before.tails() == after.tails()
    scalars = before.tails()[4]
    assert {key.split("/")[1] for key in scalars} == {
        f"{kind}_{measure}" for kind in callbacks.KINDS for measure in ("kurtosis", "top1_share")
    }
    assert all(type(value) is float for value in scalars.values())
    assert "tails/" not in capsys.readouterr().out
    assert not any(key.startswith("tails/") for entry in run.state.log_history for key in entry)


def test_a_class_instead_of_an_instance():
    reporter = Reporter()
    tiny.trainer(cls=Trainer, extra={"callbacks": [GradientTails, reporter]}, max_steps=2).train()
    assert not reporter.tails()  # every 50 steps
    run = tiny.trainer(cls=Trainer, extra={"callbacks": [GradientTails]})
    assert run.callback_handler.callbacks[-2].handler is run.callback_handler


def test_weights_and_losses_are_the_same_with_and_without():
    def run(*made):
        run = tiny.trainer(cls=Trainer, net=tiny.model(dropout=0.1), extra={"callbacks": [Reporter(), *made]})
        run.train()
        return run

    plain, watched = run(), run(GradientTails(every=1))
    assert [e.get("loss") for e in plain.state.log_history] == [e.get("loss") for e in watched.state.log_history]
    assert [e.get("grad_norm") for e in plain.state.log_history] == [
        e.get("grad_norm") for e in watched.state.log_history
    ]
    assert all(torch.equal(a, b) for a, b in zip(tiny.weights(plain), tiny.weights(watched)))


def test_released_gradients_are_missing_and_said_to_be(caplog):
    reporter, truth, starts = Reporter(), Truth(), {}

    class Start(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            starts[state.global_step + 1] = truth._by_group(dict(model.named_parameters()))

    run = tiny.trainer(
        cls=Trainer, optim="adamw", max_grad_norm=0.0, extra={"callbacks": [GradientTails(every=2), reporter, Start()]}
    )
    run.create_optimizer()
    run.optimizer.release_gradients()
    with caplog.at_level(logging.WARNING, "hf_optim.trainer.callbacks"):
        run.train()
    assert caplog.text.count("no parameter has a gradient before step 2") == 1 and "before step 4" not in caplog.text
    scalars = reporter.tails()[2]
    assert not any("/gradient" in key for key in scalars)
    for group, before in starts[2].items():
        update = starts[3][group] - before
        assert scalars[f"tails/update_kurtosis/{group}"] == pytest.approx(exact_kurtosis(update), rel=1e-10)
        exact = exact_kurtosis(starts[3][group])  # the step was over when they could be looked at
        assert scalars[f"tails/parameter_kurtosis/{group}"] == pytest.approx(exact, rel=1e-10)


def test_the_step_that_the_guard_skips_shows_why():
    class Poisoned(hf_optim.LossAwareTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (math.nan if self.state.global_step == 1 else 1.0)

    reporter = Reporter()
    run, truth = trained(Poisoned, reporters=[reporter])
    assert run.skipped_steps == 1
    for group, x in truth.gradient[2].items():
        assert reporter.tails()[2][f"tails/gradient_nonfinite/{group}"] == len(x)
        assert f"tails/gradient_nonfinite/{group}" not in reporter.tails()[4]
        assert f"tails/update_kurtosis/{group}" not in reporter.tails()[2]  # nothing moved


def test_no_reporter_is_said_and_nothing_is_recorded(caplog, monkeypatch):
    monkeypatch.setattr(callbacks, "tally", lambda x: pytest.fail("recorded for nobody"))
    with caplog.at_level(logging.WARNING, "hf_optim.trainer.callbacks"):
        trained()
    assert caplog.text.count("GradientTails") == 1
    assert (
        'records nothing: this Trainer has no reporter. Pass `--report_to tensorboard` (`pip install "hf-optim['
        in (caplog.text)
    )


def test_a_reporter_without_histograms_is_said(caplog):
    with caplog.at_level(logging.WARNING, "hf_optim.trainer.callbacks"):
        trained(reporters=[Reporter()])
    assert caplog.text.count("GradientTails") == 1 and "Reporter gets no histograms, only scalars" in caplog.text


# ---- what it costs -------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Names of all operations, and the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def test_a_tensor_is_tallied_in_pieces():
    x = torch.randn(3 * CHUNK + 5)
    with Operations() as seen:
        row = tally(x)
    assert seen.largest == 8 * CHUNK  # a chunk in fp64
    assert read(row.numpy()).counts.sum() == len(x)


ARGS = SimpleNamespace(device=torch.device("cpu"), deepspeed=None)


class Writer:
    """In place of SummaryWriter."""

    def __init__(self):
        self.histograms, self.scalars = {}, {}

    def add_histogram_raw(self, tag, low, high, num, total, squares, limits, counts, step):
        self.histograms[tag] = ([low, *limits], counts, num)

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = value

    def flush(self):
        pass


def attached(model, every=1, step=0):
    """(callback, state, writer) of a training that has begun."""
    writer = Writer()
    callback = GradientTails(every=every)
    callback.handler = SimpleNamespace(callbacks=[TensorBoardCallback(tb_writer=writer)])
    state = SimpleNamespace(global_step=step, is_world_process_zero=not dist.is_initialized() or dist.get_rank() == 0)
    callback.on_train_begin(ARGS, state, None, model=model)
    return callback, state, writer


def one_step(callback, state, model, backward, update):
    callback.on_step_begin(ARGS, state, None)
    backward()
    callback.on_pre_optimizer_step(ARGS, state, None, model=model)
    with torch.no_grad():
        update()
    callback.on_optimizer_step(ARGS, state, None)
    state.global_step += 1
    callback.on_step_end(ARGS, state, None)


def test_steps_in_between_do_nothing_and_a_recorded_one_never_waits():
    model = torch.nn.Linear(64, 64)
    callback, state, _ = attached(model, every=2)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with Operations() as seen:
        one_step(callback, state, model, lambda: None, lambda: None)
    assert seen.names == []
    with Operations() as seen:
        one_step(callback, state, model, lambda: None, lambda: None)
    waiting = {"_local_scalar_dense", "nonzero", "bincount", "unique", "_unique2", "equal", "masked_select"}
    assert seen.names and not waiting & set(seen.names)


def test_no_copy_of_the_gradients_is_alive_during_the_step():
    model = torch.nn.Linear(1024, 1024, bias=False)
    callback, state, _ = attached(model)
    model.weight.grad = torch.randn(1024, 1024)

    def large():
        gc.collect()
        alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]  # no fake ones
        return {x.data_ptr() for x in alive if x.nbytes >= 2**21}

    known = large()  # weight and gradient, and what other tests left
    assert {model.weight.data_ptr(), model.weight.grad.data_ptr()} <= known

    def look():
        assert large() <= known
        assert sum(x.numel() for x in callback._before) <= callbacks.SAMPLE
        assert callback._table.nbytes < 2**18

    one_step(callback, state, model, lambda: None, look)
    assert callback._before is None and callback._table is None


def test_the_sample_of_updates_is_bounded_and_evenly_spaced(monkeypatch):
    monkeypatch.setattr(callbacks, "SAMPLE", 10)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(11, 3)})
    layer = model["a"]
    layer.weight.data.zero_()
    callback, state, writer = attached(model)
    one_step(callback, state, model, lambda: None, lambda: layer.weight.add_(torch.arange(33.0).view(3, 11)))
    edges, counts, num = writer.histograms["tails/update/a"]
    picked = [0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0] + [0.0]  # every ceil(36 / 10)th, and of the bias
    assert num == 10 and counts == [counted(np.array(picked), *pair) for pair in zip(edges, edges[1:])]


# ---- several ranks -------------------------------------------------------------------------------------------------

SHAPES = {"h.0.attn.weight": (5, 4), "h.0.attn.bias": (7,), "h.0.mlp": (1, 6), "h.1.mlp.weight": (3, 2, 2),
          "h.1.mlp.scale": (), "head.weight": (8, 9)}  # fmt: skip


def values(seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) ** 3 for name, shape in SHAPES.items()}


class Named(torch.nn.Module):
    """Parameters with the names of a larger model."""

    def __init__(self, tensors):
        super().__init__()
        for name, x in tensors.items():
            *path, own = name.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(own, torch.nn.Parameter(x))


def record(place, place_gradient=None):
    """What the writer gets of one step whose values, gradients and updates are placed by `place`."""
    place_gradient = place_gradient or place
    model = Named({name: place(x) for name, x in values(1).items()})
    callback, state, writer = attached(model)
    gradients, updates = values(2), values(3)

    def backward():
        for name, p in model.named_parameters():
            p.grad = place_gradient(gradients[name])

    def update():
        for name, p in model.named_parameters():
            p.sub_(place(updates[name]))

    one_step(callback, state, model, backward, update)
    return writer


def expected():
    """By group, from whole tensors in float64."""
    old, new = values(1), {}
    for name, x in values(3).items():
        new[name] = (old[name] - x).double() - old[name].double()
    joined = {}
    for kind, tensors in {"parameter": old, "gradient": values(2), "update": new}.items():
        for name, x in tensors.items():
            joined.setdefault((kind, group_of(name, "block")), []).append(x.double().flatten().numpy())
    return {key: np.concatenate(pieces) for key, pieces in joined.items()}


def check(writer, label):
    exact = expected()
    assert set(writer.histograms) == {f"tails/{kind}/{group}" for kind, group in exact}, label
    for (kind, group), x in exact.items():
        edges, counts, num = writer.histograms[f"tails/{kind}/{group}"]
        assert num == len(x), (label, kind, group, num, len(x))
        assert counts == [counted(x, *pair) for pair in zip(edges, edges[1:])], (label, kind, group)
        assert writer.scalars[f"tails/{kind}_kurtosis/{group}"] == pytest.approx(exact_kurtosis(x), rel=1e-10), label


def test_one_rank():
    check(record(torch.clone), "one rank")


def sharded(x, mesh, *placements):
    placements = [Replicate() if isinstance(q, Shard) and q.dim >= x.ndim else q for q in placements]
    return distribute_tensor(x.clone(), mesh, placements)


def every_layout(world):
    mesh = init_device_mesh("cpu", (world,))
    layouts = {
        "plain": torch.clone,
        "rows": lambda x: sharded(x, mesh, Shard(0)),
        "columns": lambda x: sharded(x, mesh, Shard(1)),
        "replicated": lambda x: sharded(x, mesh, Replicate()),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
        layouts["hybrid"] = lambda x: sharded(x, square, Replicate(), Shard(0))
        layouts["part of a mesh"] = lambda x: sharded(x, square["s"], Shard(0))  # replicas that its mesh does not show
    calls, reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, *args, **kwargs: (calls.append(x.numel()), reduce(x, *args, **kwargs))[1]
    for label, place in layouts.items():
        del calls[:]
        writer = record(place)
        assert calls == [1, 3 * 4 * callbacks.WIDTH], (label, calls)  # is there a reporter; the step
        if dist.get_rank() == 0:
            check(writer, label)
        else:
            assert not writer.histograms and not writer.scalars
    writer = record(layouts["rows"], layouts["replicated"])
    if dist.get_rank() == 0:
        check(writer, "whole gradients of sharded parameters")


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_gives_the_figures_of_whole_tensors(world):
    launch(world, every_layout, world)


def same_sample():
    callbacks.SAMPLE = 10
    mesh = init_device_mesh("cpu", (2,))
    whole, rows = record(torch.clone), record(lambda x: sharded(x, mesh, Shard(0)))
    assert whole.histograms == rows.histograms
    if dist.get_rank() == 0:
        assert whole.histograms["tails/update/head"][2] == 9


def test_sharded_updates_are_sampled_at_the_same_places():
    launch(2, same_sample)


def only_rank_zero_reports():
    callback = GradientTails(every=1)
    zero = dist.get_rank() == 0
    callback.handler = SimpleNamespace(callbacks=[TensorBoardCallback(tb_writer=Writer())] if zero else [])
    model, state = torch.nn.Linear(2, 2), SimpleNamespace(global_step=0, is_world_process_zero=zero)
    callback.on_train_begin(ARGS, state, None, model=model)
    one_step(callback, state, model, lambda: None, lambda: None)  # hangs if they disagree
    if zero:
        assert callback._reporters[0].tb_writer.histograms


def test_a_reporter_on_one_rank_only():
    launch(2, only_rank_zero_reports)


def fsdp2():
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))

    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    plain, model = make(), make()
    fully_shard(model[0])
    fully_shard(model)
    with torch.no_grad():
        model(x)  # an evaluation
    assert not isinstance(model[2].weight, DTensor)  # which leaves the outermost whole
    callback, state, writer = attached(model)
    assert all(isinstance(part.parameter, DTensor) for part in callback._parts)
    plain(x).square().mean().backward()
    one_step(callback, state, model, lambda: model(x).square().mean().backward(), lambda: None)
    if dist.get_rank() == 0:
        for i in ("0", "2"):
            whole = torch.cat([p.grad.flatten() for p in plain[int(i)].parameters()])
            assert writer.scalars[f"tails/gradient_kurtosis/{i}"] == pytest.approx(exact_kurtosis(whole), rel=1e-5)
            assert writer.histograms[f"tails/gradient/{i}"][2] == len(whole)


def test_fsdp2():
    launch(2, fsdp2)


def fsdp1():
    model = FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="FSDP1 .*fsdp_version: 2"):
        attached(model)


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_is_refused():
    launch(2, fsdp1)


def test_deepspeed_is_refused():
    with pytest.raises(ValueError, match="DeepSpeed .*use DDP or FSDP2"):
        GradientTails().on_train_begin(
            SimpleNamespace(deepspeed="zero2.json"), None, None, model=torch.nn.Linear(1, 1)
        )


# ---- wandb ---------------------------------------------------------------------------------------------------------


class FakeWandb:
    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)

    class Histogram:
        def __init__(self, np_histogram):
            self.counts, self.edges = np_histogram
            assert len(self.edges) == len(self.counts) + 1 and len(self.counts) <= 512  # as wandb checks
            assert (np.diff(self.edges) > 0).all()


def test_wandb_gets_histograms_of_at_most_512_bins():
    client, reporter = FakeWandb(), WandbCallback.__new__(WandbCallback)
    reporter._wandb, reporter._initialized = client, True
    model = torch.nn.Linear(5013, 1, bias=False)
    model.weight.data = drawn().float().view(1, -1)
    callback = GradientTails(every=1)
    callback.handler = SimpleNamespace(callbacks=[reporter])
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(ARGS, state, None, model=model)
    one_step(callback, state, model, lambda: None, lambda: None)
    scalars, histograms = client.logged
    assert "train/tails/parameter_kurtosis/weight" in scalars
    assert histograms["train/global_step"] == scalars["train/global_step"] == 1
    made = histograms["tails/parameter/weight"]
    x = model.weight.detach().double().numpy().ravel()
    assert sum(made.counts) == 5013 and 256 < len(made.counts)
    for low, high, count in zip(made.edges, made.edges[1:], made.counts):
        low_edge, high_edge = x >= low if low > 0 else x > low, x < high if high > 0 else x <= high
        assert count == (low_edge & high_edge).sum()


# ---- hf-optim tails ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    hf_optim.register()
    return trained(report_to="tensorboard", optim="adamw_torch", max_steps=6)[0]


def invoke(*words):
    return CliRunner().invoke(app, ["tails", *map(str, words)])


def refused(*words):
    result = invoke(*words)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.mark.parametrize("shown", ["gradient", "parameter", "update"])
def test_command_writes_an_image(recorded, tmp_path, shown):
    target = tmp_path / "tails.png"
    result = invoke(recorded.args.output_dir, "-o", target, "--kind", shown, "--group", "*.attn")
    assert result.exit_code == 0 and result.output.strip().endswith("tails.png: 2 groups")
    assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and target.stat().st_size > 10_000


def test_image_shows_what_was_recorded(recorded):
    histograms, scalars = command._merge(command._recorded(Path(recorded.args.output_dir)))
    group = "transformer.h.1.mlp"
    figure = command._draw([group], "gradient", histograms, scalars)
    heat, kurtosis, share = figure.axes[:3]
    assert heat.get_title("left") == group
    for panel, measure in ((kurtosis, "kurtosis"), (share, "top1_share")):
        for line, kind in zip(panel.lines, command.KINDS):
            assert line.get_xdata().tolist() == [2, 4, 6]
            wanted = [e.value for e in scalars[f"tails/{kind}_{measure}/{group}"]]
            assert line.get_ydata().tolist() == wanted
    mesh = heat.collections[0]
    np.testing.assert_allclose(mesh.get_array().filled(0.0).sum(0), 1.0, atol=1e-3)  # no entry is zero
    value = histograms[f"tails/gradient/{group}"][0].histogram_value
    assert heat.lines[0].get_ydata()[0] == pytest.approx((value.sum_squares / value.num) ** 0.5)


def test_octaves_and_percentile():
    x = np.concatenate([[0.0] * 10, np.full(80, 1.5), np.full(9, -3.0), [40.0]])
    tail = read(tally(torch.tensor(x)).numpy())
    value = SimpleNamespace(
        min=tail.edges[0], bucket_limit=tail.edges[1:], bucket=tail.counts, num=100, sum_squares=tail.squares
    )
    assert command._octaves(value) == pytest.approx({1: 0.8, 2: 0.09, 6: 0.01})
    rms, percentile = command._rms_and_percentile(value)
    assert rms == pytest.approx(math.sqrt((80 * 2.25 + 81 + 1600) / 100))
    assert percentile == 3.5  # outer edge of the bin of 3


def test_resumed_runs_are_one_and_others_are_told_apart(tmp_path):
    def write(folder, steps):
        writer = TensorBoardCallback()._SummaryWriter(log_dir=str(tmp_path / folder))
        for step in steps:
            tail = read(tally(torch.full((4,), float(step))).numpy())
            callbacks._to_tensorboard(writer, {"tails/gradient/a": tail}, {"tails/gradient_kurtosis/a": step}, step)
        writer.close()

    write("one/b", [2, 4, 6])
    write("one/a", [6, 8])
    histograms, scalars = command._merge(command._recorded(tmp_path / "one"))
    assert [e.step for e in histograms["tails/gradient/a"]] == [2, 4, 6, 8]
    assert [e.value for e in scalars["tails/gradient_kurtosis/a"]] == [2, 4, 6, 8]
    write("two", [2, 4])
    assert "holds several runs; name one of" in refused(tmp_path, "-o", tmp_path / "x.png")


def test_errors_of_the_command(recorded, tmp_path, monkeypatch):
    folder, target = recorded.args.output_dir, tmp_path / "x.png"
    assert "no event files below" in refused(tmp_path / "nothing", "-o", target)
    other = TensorBoardCallback()._SummaryWriter(log_dir=str(tmp_path / "other"))
    other.add_scalar("train/loss", 1.0, 1)
    other.close()
    assert "has tails/...; train with the callback hf_optim.GradientTails" in refused(tmp_path / "other", "-o", target)
    assert "--kind must be one of parameter, gradient, update" in refused(folder, "-o", target, "--kind", "weight")
    assert "no group matches 'zz*'; recorded are transformer.wte" in refused(folder, "-o", target, "--group", "zz*")
    assert "cannot write" in refused(folder, "-o", tmp_path / "x.nothing")
    assert "cannot write" in refused(folder, "-o", tmp_path / "no" / "x.png")
    assert not target.exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
        assert 'pip install "hf-optim[tensorboard]"' in refused(folder, "-o", target)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "hf-optim[plot]"' in refused(folder, "-o", target)
