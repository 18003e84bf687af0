"""The GPU benchmark on the CPU: it resumes, keeps its budget, survives its workers and writes no wrong number."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time

import pytest
import torch

import sparseflow
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import experiments, models, problem, suite, summary, sweep
from benchmarks.gpu.layers import HEADLINE, LINEAR, PRUNED, PRUNED_LINEAR, LayerShape, pruned, resnet18, resnet50
from benchmarks.gpu.problem import Problem, SparseWay
from benchmarks.gpu.records import Figure, Gate, Journal, LayerRow, RedGate, to_json
from benchmarks.gpu.runner import Budget, Cell, limit, run_cells
from benchmarks.gpu.spikes import CLUSTERED, INDEPENDENT, PERSISTENT, draw
from benchmarks.gpu.supervisor import in_flight, supervise
from benchmarks.gpu.sweep import Sweep
from benchmarks.gpu.timing import Sampler, WallTimer, alternate
from sparseflow.bench.gpus import Gpu, parse, pick
from sparseflow.kernels.cpu import engine
from sparseflow.kernels.weight_blocks import present_blocks

CPU = torch.device("cpu")
TINY = LayerShape("3x3 16@5", 16, 16, (5, 5), kernel=3)


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeTimer:
    """Runs everything once and says what the runs took, by the order in which they were prepared."""

    def __init__(self):
        self.prepared = 0

    def prepare(self, run, inputs, *, graphed=True):
        for index in range(inputs):
            run(index)
        self.prepared += 1
        ms = float(self.prepared)
        return Sampler(lambda: ms, ms)


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch):
    monkeypatch.setattr(problem, "_CPU_CACHE", 0)


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "records.jsonl", {"commit": "abc", "device": "fake"})


def figure(name: str = "x", value: float = 1.0) -> Figure:
    return Figure("test", name, value, "ms")


def layer_row(gate: Gate, **changes) -> LayerRow:
    fields = {
        "stage": "sweep",
        "layer": "3x3",
        "dtype": "float16",
        "steps_times_batch": 128,
        "pattern": CLUSTERED,
        "target": 0.015,
        "density": 0.0151,
        "path": "tile",
        "variant": "v",
        "axis": "occupancy",
        "load": 0.1,
        "ms": (0.9, 1.0, 1.1),
        "prescan_ms": 0.2,
        "includes_prescan": True,
        "baseline": "dense, same dtype",
        "baseline_ms": (3.9, 4.0, 4.1),
        "speedup": 4.0,
        "cold": True,
        "gate": gate,
    }
    return LayerRow(**{**fields, **changes})


# Resumption


def test_a_rerun_does_only_what_is_missing(journal):
    calls: list[str] = []

    def cell(name):
        return Cell(name, 0, 1.0, lambda: [calls.append(name) or figure(name)])

    run_cells([cell("a")], journal, Budget(100), "first")
    run_cells([cell("a"), cell("b")], journal, Budget(100), "second")
    assert calls == ["a", "b"]
    assert [row["name"] for row in journal.rows()] == ["a", "b"]


def test_other_commits_and_machines_do_not_count(journal):
    run_cells([Cell("a", 0, 1.0, lambda: [figure()])], journal, Budget(100), "first")
    other = Journal(journal.path, {**journal.identity, "commit": "def"})
    assert journal.done() == {"a"}
    assert other.done() == set()


def test_a_line_that_was_cut_off_is_passed_over(journal):
    run_cells([Cell("a", 0, 1.0, lambda: [figure()])], journal, Budget(100), "first")
    with journal.path.open("a") as file:
        file.write('{"schema": 1, "event": "finis')
    assert journal.done() == {"a"}


def test_a_failed_cell_is_tried_again_in_the_next_run_only(journal):
    calls = []

    def fail():
        calls.append(1)
        raise ValueError("no")

    cells = [Cell("bad", 0, 1.0, fail), Cell("good", 1, 1.0, lambda: [figure()])]
    for run in ("first", "first", "second"):
        assert run_cells(cells, journal, Budget(100), run)
    assert len(calls) == 2
    assert journal.done() == {"good"}
    assert journal.failures() == {"bad": "ValueError: no"}


# Budget


def test_the_most_important_cells_come_first_and_none_that_does_not_fit(journal):
    clock, order = FakeClock(), []

    def cell(name, priority, seconds):
        def run():
            order.append(name)
            clock.now += seconds
            return [figure(name)]

        return Cell(name, priority, seconds, run)

    cells = [cell("late", 2, 30), cell("early", 0, 40), cell("long", 1, 50), cell("short", 1, 10)]
    run_cells(cells, journal, Budget(85, clock), "run")
    assert order == ["early", "short", "late"]


def test_the_plan_has_the_goals_before_the_grid_and_names_are_unique():
    cells = command.cells(FakeTimer(), CPU)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    grid = min(index for index, name in enumerate(names) if name.startswith("sweep"))
    for stage in ("tests", "experiments", "headline", "full occupancy", "gather", "linear"):
        assert max(index for index, name in enumerate(names) if name.startswith(stage)) < grid


def test_the_plan_covers_what_the_documentation_promises():
    plan = [sweep_ for _, sweep_ in sweep.planned()]
    assert {s.dtype for s in plan} == {torch.float16, torch.bfloat16, torch.float32}
    assert {s.steps_times_batch for s in plan if s.stage == "sweep"} == {4, 32, 128, 256}
    layers = {s.layer for s in plan}
    assert layers >= {
        *resnet18(224),
        *resnet50(224),
        *resnet18(32),
        *resnet50(32),
        *LINEAR,
        *dict(HEADLINE),
        *PRUNED,
        *PRUNED_LINEAR,
    }
    assert {(s.layer.name, s.steps_times_batch) for s in plan if s.stage == "linear"} == {
        (layer.name, rows) for layer in LINEAR for rows in (1, 4, 32)
    }
    titles = {cell.name for cell in models.cells(FakeTimer(), CPU)}
    assert len(titles) == 2 * 7 * 3  # layer by layer, and fused


# Processes that crash or hang


def _worker(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_a_worker_that_crashes_is_replaced_and_its_cell_is_failed(journal):
    started: list[int] = []

    def start(arguments):
        started.append(1)
        if len(started) == 1:
            journal.write("started", "bad", run="r", limit_s=60.0)
            return subprocess.Popen(_worker("import os; os.abort()"))
        journal.write("started", "good", run="r", limit_s=60.0)
        journal.write("finished", "good", rows=[], seconds=0.0)
        return subprocess.Popen(_worker("pass"))

    assert supervise([], journal, Budget(60), "r", start) == 2
    assert "exit code" in journal.failures()["bad"]
    assert in_flight(journal, "r") is None


def test_a_worker_that_hangs_is_ended(journal):
    processes = []

    def start(arguments):
        if processes:
            return subprocess.Popen(_worker("pass"))
        journal.write("started", "hung", run="r", limit_s=0.1)
        processes.append(subprocess.Popen(_worker("import time; time.sleep(60)")))
        return processes[0]

    began = time.monotonic()
    supervise([], journal, Budget(60), "r", start)
    assert processes[0].poll() is not None
    assert time.monotonic() - began < 30
    assert "hung" in journal.failures()


def test_a_device_error_ends_the_worker_and_running_out_of_memory_does_not(journal):
    def fail(message):
        def run():
            raise RuntimeError(message)

        return run

    ends = [Cell("crash", 0, 1.0, fail("CUDA error: an illegal memory access was encountered"))]
    goes_on = [Cell("full", 0, 1.0, fail("the batch does not fit"))]
    assert not run_cells(ends, journal, Budget(100), "r")
    assert run_cells(goes_on, journal, Budget(100), "r")
    assert limit(ends[0]) > 1.0


# Gates


def test_a_red_row_is_never_written(journal):
    with pytest.raises(RedGate):
        to_json(layer_row(Gate(1.01, "all")))
    run_cells([Cell("wrong", 0, 1.0, lambda: [layer_row(Gate(float("nan"), "all"))])], journal, Budget(100), "r")
    assert journal.rows() == []
    assert "RedGate" in journal.failures()["wrong"]


def test_numbers_have_to_be_finite():
    with pytest.raises(ValueError, match="speedup"):
        to_json(layer_row(Gate(0.1, "all"), speedup=float("inf")))


HARM = (lambda y: y.zero_(), lambda y: y[-1].fill_(float("nan")), lambda y: y[0, 0].add_(0.25))


@pytest.mark.parametrize("harm", HARM)
def test_a_wrong_result_is_caught_by_the_gate(harm):
    case = Problem.of(TINY, 4, torch.float32, CPU)
    xs = case.spikes(INDEPENDENT, 0.3)
    assert case.gate(lambda x: TINY.call.dense(x, case.weight, None), xs).green

    def wrong(x):
        y = TINY.call.dense(x, case.weight, None)
        harm(y)
        return y

    with pytest.raises(RedGate):
        case.gate(wrong, xs)


def test_a_wrong_kernel_has_no_row_and_the_right_one_keeps_its_own(monkeypatch):
    right = SparseWay.__call__

    def wrong_at_this_density(way, x, turn=0):
        y = right(way, x, turn)
        return y + 1 if way.kernel.axis == "occupancy" and float((x != 0).float().mean()) > 0.2 else y

    monkeypatch.setattr(SparseWay, "__call__", wrong_at_this_density)
    case = Sweep("test", TINY, 2, torch.float16, ((INDEPENDENT, 0.4), (INDEPENDENT, 0.02)))
    rows = sweep.run(case, FakeTimer(), CPU)
    skipped = [row for row in rows if row.kind == "skipped"]
    assert len(skipped) == 1
    assert "budgets off" in skipped[0].reason
    assert "tile" in skipped[0].name
    assert {(row.path, row.target) for row in rows if row.kind == "layer"} == {("tile", 0.02), ("event", 0.02)}


def test_a_variant_that_does_not_compile_leaves_the_others_standing(monkeypatch):
    right = SparseWay.of.__func__

    def broken(cls, kernel, variant, weights):
        if variant == kernel.variants()[0]:
            raise RuntimeError("out of resource: shared memory")
        return right(cls, kernel, variant, weights)

    monkeypatch.setattr(SparseWay, "of", classmethod(broken))
    rows = sweep.run(Sweep("test", TINY, 1, torch.float16, ((INDEPENDENT, 0.05),)), FakeTimer(), CPU)
    skipped = [row for row in rows if row.kind == "skipped"]
    assert len(skipped) == 2
    assert all("shared memory" in row.reason for row in skipped)
    assert {row.path for row in rows if row.kind == "layer"} == {"tile", "event"}


# The path of a layer sweep, in Triton's interpreter


@pytest.mark.parametrize("together", [True, False])
def test_a_pruned_layer_has_the_kernel_for_pruned_weights_beside_the_others(together):
    shape = pruned(LayerShape("3x3 40@3", 40, 40, (3, 3), kernel=3), 0.5, together=together)
    case = Problem.of(shape, 1, torch.float16, CPU)
    present = present_blocks(case.weight)
    assert 0 < present.sum() < present.numel()
    assert bool((present == present[0]).all()) == together
    kernels = case.kernels()
    assert [str(kernel.path) for kernel in kernels] == ["pruned", "tile", "event"]
    way = SparseWay.of(kernels[0], kernels[0].variants()[0], case.weights)
    assert case.gate(way, case.spikes(INDEPENDENT, 0.2)).green


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=sweep.short)
def test_a_sweep_runs_through_every_kernel(dtype):
    case = Sweep("test", TINY, 2, dtype, ((PERSISTENT, 0.05),), as_published=True, dispatched=True)
    rows = [to_json(row) for row in sweep.run(case, FakeTimer(), CPU)]
    assert {row["path"] for row in rows} == {"tile", "event", "dispatched"}
    assert {row["includes_prescan"] for row in rows} == {True, False}
    assert all(row["dtype"] == sweep.short(dtype) and row["speedup"] > 0 for row in rows)
    assert all(0.0 <= row["load"] <= 1.0 and row["gate"]["worst"] <= 1.0 for row in rows)
    dense = [row for row in rows if row["baseline"].startswith("dense")]
    assert [row["includes_prescan"] for row in dense] == [True, True, True]


def test_a_linear_sweep_turns_its_weights(monkeypatch):
    monkeypatch.setattr(problem, "_CPU_CACHE", 2500)
    case = Problem.of(LayerShape("linear", 32, 16), 1, torch.float16, CPU)
    assert len(case.weights) == 5  # of 1024 bytes each
    assert case.cold
    assert case.inputs >= len(case.weights)


def test_a_linear_sweep_runs_through_every_kernel():
    case = Sweep("test", LayerShape("linear 64->32", 64, 32), 1, torch.float16, ((INDEPENDENT, 0.05),))
    assert {row.path for row in sweep.run(case, FakeTimer(), CPU)} == {"tile", "event"}


def test_the_strongest_dense_way_is_the_baseline():
    times = {
        "dense": (2.0, 2.0, 2.0),
        "dense compiled": (1.5, 1.5, 1.5),
        "eager float32": (9.0, 9.0, 9.0),
        "way": (0.5, 0.5, 0.5),
        "way prescan": (0.1, 0.1, 0.1),
    }
    case = Problem.of(TINY, 2, torch.float32, CPU)
    kernel = case.kernels()[0]
    way = SparseWay.of(kernel, kernel.variants()[0], case.weights)
    x = case.spikes(INDEPENDENT, 0.2)[0]
    row = sweep.RowMaker(Sweep("test", TINY, 2, torch.float32, ()), case, (INDEPENDENT, 0.2), times)
    honest, eager = row.of_way("way", way, Gate(0.1, "all"), x)
    assert ("compiled" in honest.baseline, honest.speedup) == (True, 3.0)
    assert ("eager" in eager.baseline, eager.speedup) == (True, 18.0)


@pytest.mark.parametrize("pattern", [INDEPENDENT, CLUSTERED, PERSISTENT])
def test_spikes_have_their_density(pattern):
    x = draw(pattern, torch.zeros(8, 32, 16, 16), 0.1, seed=1)
    assert float(x.mean()) == pytest.approx(0.1, abs=0.02)
    assert set(x.unique().tolist()) == {0.0, 1.0}


def test_half_of_the_neurons_never_fire():
    x = draw(PERSISTENT, torch.zeros(64, 16, 8, 8), 0.2, seed=1)
    silent = x.unflatten(0, (4, 16)).sum(0) == 0
    chance = (1 - 0.4) ** 4 / 2
    assert float(silent.float().mean()) == pytest.approx(0.5 + chance, abs=0.03)


# Timing, experiments, models, command line


def test_contenders_take_turns_and_hopeless_ones_few():
    taken: list[str] = []

    def sampler(name, ms):
        return Sampler(lambda: taken.append(name) or ms, ms)

    samplers = {"a": sampler("a", 1.0), "b": sampler("b", 2.0), "slow": sampler("slow", 100.0)}
    times = alternate(samplers, 20)
    assert (taken.count("a"), taken.count("b"), taken.count("slow")) == (20, 20, 4)
    assert times["b"] == (2.0, 2.0, 2.0)
    assert {"".join(taken[i : i + 2]) for i in range(12, len(taken), 2)} == {"ab", "ba"}


def test_the_wall_timer_times_a_call():
    seen = []
    sampler = WallTimer().prepare(lambda i: seen.append(i), 3)
    assert sampler.sample() > 0
    assert seen == [0, 1, 2] * 3


def test_ceilings_are_computed_from_sizes_and_times():
    timer = FakeTimer()
    (copy,) = experiments.copy_bandwidth(timer, CPU, size=1 << 20)
    assert copy.value == pytest.approx(2 * (1 << 20) / 1.0 / 1e9)
    rates = {row.name: row.value for row in experiments.matmul_rate(timer, CPU, n=16)}
    assert rates["matmul float16"] == pytest.approx(2 * 16**3 / 2.0 / 1e9)
    (node,) = experiments.graph_node(timer, CPU)
    assert (node.value, node.unit) == (1e3 * 5.0 / 200, "us")


def test_the_suite_is_recorded_whatever_becomes_of_it():
    said = "import sys; print('FAILED tests/x.py::y'); print('1 failed, 2 passed, 7 deselected in 0.10s'); sys.exit(1)"
    rows = {row.name: row for row in suite.run((sys.executable, "-c", said))}
    assert (rows["passed"].value, rows["failed"].value, rows["failed"].note) == (2, 1, "FAILED tests/x.py::y")
    (late,) = suite.run((sys.executable, "-c", "import time; time.sleep(30)"), seconds=0.2)
    assert "did not end" in late.reason
    assert any(row.kind == "skipped" for row in suite.run((sys.executable, "-c", "pass")))


def test_a_network_runs_dense_and_accelerated():
    pytest.importorskip("spikingjelly")
    model = models.Model("spiking_resnet18", batch=1, compiled=False, side=32)
    rows = [to_json(row) for row in models.run(model, FakeTimer(), CPU)]
    assert {row["baseline"] for row in rows} == {"dense float16 graphed", "eager float32"}
    assert {row["run"] for row in rows} == {"sparseflow float16 graphed"}
    assert all(0.0 <= row["agreement"] <= 1.0 for row in rows)


@pytest.mark.skipif(not engine.available(), reason="no native engine on this machine")
def test_a_fused_network_is_timed_replayed_and_launched(monkeypatch):
    pytest.importorskip("spikingjelly")
    model = models.Model("spiking_resnet18", batch=1, compiled=False, side=32)
    monkeypatch.setattr(models.sparseflow, "accelerate", functools.partial(sparseflow.accelerate, mode="sparse"))
    rows = [to_json(row) for row in models.run_fused(model, FakeTimer(), CPU)]
    assert {row["run"] for row in rows} == {f"sparseflow float32 fused, {how}" for how in ("replayed", "launched")}
    assert {row["baseline"] for row in rows} == {"dense float32 graphed", "eager float32"}
    assert {row["dtype"] for row in rows} == {"float32"}


def test_replays_that_differ_are_not_reported():
    answer = torch.ones(2)
    models.check_replays(lambda i: answer, lambda i: answer, 3)
    with pytest.raises(RedGate, match="replay of input 1"):
        models.check_replays(lambda i: answer * (i != 1), lambda i: answer, 3)


def test_networks_are_skipped_with_a_reason_without_spikingjelly(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    (row,) = models.run(models.Model("spiking_resnet18", 1, False), FakeTimer(), CPU)
    assert (row.kind, row.reason) == ("skipped", "SpikingJelly is not installed")


def test_gpu_is_the_idle_one_with_the_most_memory_unless_named():
    gpus = [Gpu(0, 90_000, 80), Gpu(1, 10_000, 0), Gpu(2, 60_000, 1)]
    assert pick(gpus) == 2
    assert pick(gpus, wanted=0) == 0
    assert pick([Gpu(0, 5, 50), Gpu(1, 9, 90)]) == 1
    with pytest.raises(ValueError, match="no device 7"):
        pick(gpus, wanted=7)
    with pytest.raises(ValueError, match="no CUDA device"):
        pick([])


def test_listed_gpus_are_matched_by_their_identifier():
    listing = "GPU-aa, 100, 3\nGPU-bb, 200, 0\n"
    assert parse(listing, ["bb", "GPU-aa", "cc"]) == [Gpu(0, 200, 0), Gpu(1, 100, 3), Gpu(2, 0, 0)]


def test_without_a_gpu_there_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "visible", list)
    assert command.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: no CUDA device is visible\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_ends_with_all_rows_in_one_file_and_a_summary(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "visible", lambda: [Gpu(0, 1000, 0)])
    monkeypatch.setattr(command, "identity", lambda device, commit: {"device": device, "commit": commit})

    def worker(arguments, journal, budget, run):
        assert arguments[arguments.index("--commit") + 1] == "abc"
        assert run_cells([Cell("copy", 0, 1.0, lambda: [figure("copy bandwidth", 4.3)])], journal, budget, run)

    monkeypatch.setattr(command, "supervise", worker)
    assert command.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    assert "copy bandwidth 4.3" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["identity"] == {"device": 0, "commit": "abc"}


def test_goals_are_judged_by_the_fastest_way_over_honest_baselines(journal, tmp_path):
    gate = Gate(0.5, "all")
    rows = [
        layer_row(gate, speedup=2.0, ms=(2.0, 2.0, 2.0)),
        layer_row(gate, speedup=4.0, variant="faster"),
        layer_row(gate, speedup=90.0, baseline="eager float32"),
        layer_row(gate, speedup=80.0, includes_prescan=False),
        layer_row(gate, speedup=1.0, layer="another"),
    ]
    run_cells([Cell("cell", 0, 1.0, lambda: rows)], journal, Budget(100), "r")
    record = summary.collect(journal, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == record
    told = {goal["goal"]: goal["measured"] for goal in record["goals"]}
    assert told["98.5 % sparsity, clustered spikes, float16"].startswith("1.00x to 4.00x")
    assert told["silent layers, float16"] == "not measured"
    assert "4.00x" in summary.tell(record)
