"""The peers suite: the protocol, the gates, and what becomes of peers that fail, mostly with stand-ins for peers."""

import sys

import pytest
import torch

from sparseflow.bench import peers
from sparseflow.bench.peers import catalogue, environments
from sparseflow.bench.peers.catalogue import PEERS, PROGRAMS, Peer
from sparseflow.bench.peers.contest import Settings, launch, measure
from sparseflow.bench.peers.environments import Group, InstallError, folder_of, python_of
from sparseflow.bench.peers.problems import LifLayer, Product, largest_layer, read_raw, write_raw
from sparseflow.bench.peers.remote import PeerError, Worker
from sparseflow.bench.records import Absent, Point, Results, Scope
from sparseflow.bench.suites import Options

NOWHERE = Group("nowhere", ("no-such-package-of-a-peer",), "no_such_package_of_a_peer", on_torch=False)
SMALL = Product(12, 8, 3, densities=(0.25, 0.5))
SETTINGS = Settings(repeats=4, install=False)

# A product in plain Python. Its variant says what it does wrong, and when.
FAKE = """
import array, math, os, sys
sys.path.insert(0, {programs!r})
from wire import serve

def read(file, shape):
    values = array.array("f", open(file, "rb").read())[: math.prod(shape)]
    return [values[i : i + shape[1]] for i in range(0, len(values), shape[1])]

class Fake:
    note = "in plain Python"

    def __init__(self, variant, problem):
        if variant.endswith("no build"):
            raise RuntimeError("this machine has no spikes")
        print("chatter that must not reach the protocol")
        self.variant, self.shape, self.calls = variant, problem["x"], 0
        self.weight = read(problem["weight"], problem["w"])

    def load(self, files):
        self.inputs = [read(file, self.shape) for file in files]

    def call(self, index):
        self.calls += 1
        if self.variant.endswith("crash") and self.calls == 4:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(7)
        off = 0.5 if self.variant.endswith("wrong") else 0.0
        return [[math.sumprod(x, w) + off if hasattr(math, "sumprod") else
                 sum(a * b for a, b in zip(x, w)) + off for w in self.weight] for x in self.inputs[index]]

    def save(self, output, file):
        flat = array.array("f", [value for row in output for value in row])
        open(file, "wb").write(flat.tobytes())
        return [len(output), len(output[0])]

if __name__ == "__main__":
    serve(Fake)
"""


def fake(name, variant="right", **options):
    return Peer(name, "product", catalogue.TORCH, "fake.py", variant, "fakes", **options)


class Recorder:
    """Starts stand-ins, and keeps which of them was asked what."""

    def __init__(self, folder):
        self.file, self.asked = folder / "fake.py", []
        self.file.write_text(FAKE.format(programs=str(PROGRAMS)))

    def __call__(self, peer, settings):
        if peer.group is NOWHERE:
            python_of(peer.group, install=settings.install)
        worker = Worker([sys.executable, str(self.file), peer.variant])
        request = worker.request

        def recorded(op, **fields):
            self.asked.append((peer.name, op))
            return request(op, **fields)

        worker.request = recorded
        return worker


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path)


def rows_of(found, kind):
    return [row for row in found if isinstance(row, kind)]


def test_every_peer_gets_a_point_at_every_density_and_ours_one_against_each(recorder):
    entrants = [fake("ours", "sparseflow"), fake("dense", dense=True, compiles=True), fake("other")]
    found = list(measure(SMALL, entrants, SETTINGS, recorder))
    assert not rows_of(found, Absent)
    at_first = [point for point in found if point.rho == 0.25]
    assert [(p.kernel, p.baseline, p.honest) for p in at_first] == [
        ("ours", "dense", True),
        ("dense", "dense", True),
        ("other", "dense", True),
        ("ours", "other", False),
    ]
    assert len(found) == 2 * len(at_first)
    assert [p.scope for p in at_first] == [Scope.EXACT, Scope.PEER, Scope.PEER, Scope.EXACT]
    assert all(p.value and p.value[1] > 0 and p.gate.green and p.case == SMALL.name for p in found)
    assert found[0].config["how"] == "in plain Python"


def test_points_survive_the_results_file(recorder, tmp_path):
    found = list(measure(SMALL, [fake("dense", dense=True)], SETTINGS, recorder))
    Results({}, 0, points=found).save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").points == found


def test_turns_alternate_in_another_order_every_round(recorder):
    names = ["a", "b", "c", "d"]
    list(measure(SMALL, [fake(name) for name in names], SETTINGS, recorder))
    turns = [name for name, op in recorder.asked if op == "time"]
    rounds = [tuple(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert len(rounds) == SETTINGS.repeats * len(SMALL.densities)
    assert all(sorted(turn) == names for turn in rounds)
    assert len(set(rounds)) > 1


def test_nothing_is_timed_before_all_were_checked(recorder):
    list(measure(Product(12, 8, 3, densities=(0.5,)), [fake("a"), fake("b")], SETTINGS, recorder))
    operations = [op for _, op in recorder.asked]
    assert operations.index("time") > max(i for i, op in enumerate(operations) if op == "check")


def test_wrong_results_have_a_red_gate_and_no_figure(recorder):
    found = list(measure(SMALL, [fake("dense", "wrong", dense=True), fake("other", dense=True)], SETTINGS, recorder))
    wrong, right = found[:2]
    assert (wrong.kernel, wrong.value, wrong.gate.green) == ("dense", None, False)
    assert "budgets off" in wrong.gate.why[0]
    assert ("dense", "time") not in recorder.asked
    assert right.gate.green
    assert right.baseline == "other"


def test_without_a_dense_path_nothing_is_honest(recorder):
    point = next(measure(SMALL, [fake("ours", "sparseflow")], SETTINGS, recorder))
    assert (point.baseline, point.baseline_value, point.honest) == ("none", None, False)


def test_a_peer_that_dies_is_absent_and_the_rest_goes_on(recorder):
    found = list(measure(SMALL, [fake("dense", dense=True), fake("frail", "crash")], SETTINGS, recorder))
    (absent,) = rows_of(found, Absent)
    assert absent.name == "frail"
    assert "status 7" in absent.error
    assert "out of luck" in absent.error
    assert [(point.kernel, point.rho) for point in rows_of(found, Point)] == [("dense", 0.25), ("dense", 0.5)]
    assert all(point.value for point in rows_of(found, Point))


def test_a_peer_that_cannot_be_built_is_absent_with_its_error(recorder):
    found = list(measure(SMALL, [fake("broken", "no build"), fake("dense", dense=True)], SETTINGS, recorder))
    assert found[0] == Absent("broken", "prepare: RuntimeError: this machine has no spikes")
    assert {row.kernel for row in found[1:]} == {"dense"}


def test_a_peer_that_compiles_takes_part_only_where_compiling_is_asked_for(recorder):
    entrants = [fake("dense", dense=True), fake("compiled", dense=True, compiles=True)]
    without = Settings(repeats=1, compile=False, install=False)
    found = list(measure(SMALL, entrants, without, recorder))
    assert {(point.kernel, point.honest) for point in found} == {("dense", False)}


def test_precisions_are_compared_with_their_own_only(recorder):
    entrants = [fake("a", dense=True), fake("b", precision="bf16", dense=True), fake("ours", "sparseflow")]
    found = list(measure(Product(12, 8, 3, densities=(0.5,)), entrants, SETTINGS, recorder))
    assert {(point.kernel, point.baseline) for point in found} == {("a", "a"), ("b", "b"), ("ours", "a")}


def test_a_worker_that_takes_too_long_is_killed():
    with (
        Worker([sys.executable, "-c", "import time; time.sleep(60)"]) as worker,
        pytest.raises(PeerError, match=r"check took more than 0\.2 s"),
    ):
        worker.request("check", limit_s=0.2)


def test_a_failed_installation_is_absent_with_the_installers_words(recorder, tmp_path, monkeypatch):
    monkeypatch.setenv(environments.PEERS_DIR, str(tmp_path / "peers"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    nowhere = Peer("nowhere", "product", NOWHERE, "fake.py", "right", "fakes")
    install = Settings(repeats=1)
    found = list(measure(SMALL, [nowhere, fake("dense", dense=True)], install, recorder))
    assert found[0].name == "nowhere"
    assert "no-such-package-of-a-peer" in found[0].error
    assert [row.kernel for row in found[1:]] == ["dense", "dense"]
    monkeypatch.setattr(
        environments, "_pip", lambda *_: pytest.fail("a failed installation is not tried again at once")
    )
    with pytest.raises(InstallError, match="no-such-package-of-a-peer"):
        python_of(NOWHERE, install=True)


def test_a_quick_run_installs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(environments.PEERS_DIR, str(tmp_path / "peers"))
    with pytest.raises(InstallError, match="run once without --quick"):
        python_of(NOWHERE, install=False)
    assert not (tmp_path / "peers").exists()


def test_an_environment_belongs_to_its_requirements(tmp_path, monkeypatch):
    monkeypatch.setenv(environments.PEERS_DIR, str(tmp_path))
    other = Group("nowhere", ("no-such-package-of-a-peer>=2",), "no_such_package_of_a_peer")
    assert folder_of(NOWHERE) != folder_of(other)
    assert folder_of(NOWHERE).parent == tmp_path


def test_what_is_importable_here_needs_no_environment():
    assert str(python_of(catalogue.TORCH, install=False)) == sys.executable


def test_raw_files_keep_every_value(tmp_path):
    values = torch.randn(3, 5)
    assert torch.equal(read_raw(write_raw(values, tmp_path / "values"), (3, 5)), values)


def test_the_gate_of_products_sees_one_wrong_output():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(4, 64, generator=generator).round(), torch.randn(32, 64, generator=generator)
    reference = Product(64, 32, 4).reference(x, weight)
    y = x @ weight.t()
    assert reference.judge(y, "fp32").green
    assert reference.judge(x.bfloat16() @ weight.bfloat16().t(), "bf16").green
    assert not reference.judge(x.bfloat16() @ weight.bfloat16().t(), "fp32").green
    y[2, 3] += 1e-3
    assert not reference.judge(y, "fp32").green
    y[2, 3] = float("nan")
    assert not reference.judge(y, "fp32").green
    assert not reference.judge(y[:, :-1], "fp32").green


LAYER = LifLayer(48, 0.2, batch=3, steps=40)


def layer_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(LAYER.x).bernoulli_(0.2, generator=generator)
    return x, LAYER.weight(generator)


def test_the_gate_of_layers_sees_one_wrong_spike():
    x, weight = layer_data()
    reference = LAYER.reference(x, weight)
    assert 0.02 < reference.densities["output"] < 0.2
    right = reference.spikes.float()
    assert reference.judge(right, "fp32").green
    wrong = right.clone()
    wrong[20, 1, 7] = 1 - wrong[20, 1, 7]
    gate = reference.judge(wrong, "fp32")
    assert not gate.green
    assert "1 neurons" in gate.why[0]
    assert not reference.judge(right[:-1], "fp32").green


def test_the_gate_of_layers_allows_a_flip_at_the_threshold_and_what_follows_from_it():
    weight, x = torch.ones(1, 1), torch.ones(3, 1, 1)  # v = 1 in every step: exactly at the threshold
    reference = LifLayer(1, 1.0, batch=1, steps=3).reference(x, weight)
    assert reference.spikes.flatten().tolist() == [True, True, True]
    late = torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1)
    assert reference.judge(late, "fp32").green


@pytest.fixture
def programs(monkeypatch):
    """Makes the workers' programs importable, and undoes what they set for the whole process."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(PROGRAMS))
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


def described(problem, x, weight, folder):
    write_raw(weight, folder / "weight")
    write_raw(x, folder / "x")
    return {"x": problem.x, "w": problem.w, "weight": str(folder / "weight"), "threads": 1, "device": "cpu"}


def result_of(contender, problem, folder):
    contender.load([str(folder / "x")])
    shape = contender.save(contender.call(0), str(folder / "y"))
    return read_raw(folder / "y", shape)


@pytest.mark.parametrize(
    "variant", ["loop", "spikingjelly", "snntorch", "sparseflow spikingjelly", "sparseflow snntorch"]
)
def test_layers_of_frameworks_that_are_installed_here_compute_the_same(variant, programs, tmp_path):
    if "loop" not in variant:
        pytest.importorskip(variant.removeprefix("sparseflow "))
    import lif_layers

    x, weight = layer_data()
    contender = lif_layers.build(variant, described(LAYER, x, weight, tmp_path))
    gate = LAYER.reference(x, weight).judge(result_of(contender, LAYER, tmp_path), "fp32")
    assert gate.green, gate.why


@pytest.mark.parametrize(
    "variant", ["eager fp32", "eager bf16", "csr", "csr, own format", "sparseflow fp32", "sparseflow bf16"]
)
def test_products_in_pytorch_are_right(variant, programs, tmp_path):
    import on_torch

    problem = Product(64, 32, 4)
    x, weight = torch.rand(problem.x).round(), problem.weight(torch.Generator().manual_seed(0))
    contender = on_torch.build(variant, described(problem, x, weight, tmp_path))
    precision = "bf16" if variant.endswith("bf16") else "fp32"
    gate = problem.reference(x, weight).judge(result_of(contender, problem, tmp_path), precision)
    assert gate.green, gate.why


_ELSEWHERE = (catalogue.NORSE, catalogue.SINABS, catalogue.BRAINEVENT, catalogue.SCIPY)
ELSEWHERE = [peer for peer in PEERS if peer.group in _ELSEWHERE]


@pytest.mark.parametrize("peer", ELSEWHERE, ids=lambda peer: peer.name)
def test_a_real_peer_whose_environment_is_there(peer):
    try:
        python_of(peer.group, install=False)
    except InstallError as error:
        pytest.skip(str(error))
    problem = Product(64, 32, 4, (0.2,)) if peer.kind == "product" else LAYER
    (point,) = measure(problem, [peer], Settings(repeats=1, install=False), launch)
    assert isinstance(point, Point), point
    assert point.gate.green, point.gate.why
    assert point.value is not None
    assert point.config["versions"]


def test_every_program_is_there():
    assert {peer.program for peer in PEERS} <= {path.name for path in PROGRAMS.iterdir()}


def test_cases_have_names_of_their_own_and_quick_ones_are_few():
    names = [case.name for case in peers.run(Options())]
    assert len(set(names)) == len(names)
    assert "spikes x 25088x4096, batch*T 4" in names
    assert len(list(peers.run(Options(quick=True)))) < len(names)


def test_what_no_machine_of_this_kind_has_is_absent_with_a_reason(monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda *_: iter(()))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = {row.name: row.error for row in peers.rows(LifLayer(64), SETTINGS, False)}
    assert found["SpikingJelly Triton"] == "no CUDA device"
    assert "no CuPy backend" in found["SpikingJelly CuPy"]
    assert "brainevent CUDA" in {row.name for row in peers.rows(SMALL, SETTINGS, False)}


def test_the_layer_shrinks_with_memory(monkeypatch):
    from sparseflow.bench.peers import problems

    monkeypatch.setattr(problems, "_physical_memory", lambda: 1 << 40)
    assert largest_layer() == 16384
    monkeypatch.setattr(problems, "_physical_memory", lambda: 16 << 30)
    assert largest_layer() < 16384
