"""Fitting times to terms: what is held out, what is shipped, and how a study is predicted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fit_predictor import fit_predictor, layer_calls, measured_networks, read_calls
from sparseflow.study.predictor import (
    LOOP,
    Error,
    LayerModels,
    Model,
    Point,
    Predictor,
    accelerated_net_terms,
    call_of,
    dense_net_terms,
    dense_terms,
    eager_terms,
    error_of,
    fit,
    fitted,
    fused_terms,
    held_out,
    held_out_error,
    points_of,
    prediction_error,
    shipped,
    sparse_terms,
)
from sparseflow.study.records import Choice, Layer, LayerShape, Matched, Net, Neuron, Status, Study, Surrogate
from sparseflow.study.shapes import LayerCall, NetCall

from .layer_shapes import convolution

MODELS = ("dense_layer", "sparse_layer", "dense_net", "accelerated_net")
NOTHING = Error(0.0, 0.0, 0, 0)


@pytest.fixture(scope="module")
def refitted() -> Predictor:
    return fit_predictor()


def test_shipped_predictor_is_of_the_committed_results(refitted):
    assert shipped().sources == refitted.sources, "the results changed: python -m benchmarks.fit_predictor"
    assert shipped().machine == refitted.machine


@pytest.mark.parametrize("name", MODELS)
def test_refit_gives_the_shipped_costs_and_errors(refitted, name):
    new, old = getattr(refitted, name), getattr(shipped(), name)
    assert new.costs == pytest.approx(old.costs, rel=1e-3, abs=1e-12)
    assert dataclasses.asdict(new.error) == pytest.approx(dataclasses.asdict(old.error), abs=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_costs_are_not_negative_and_not_all_zero(name):
    costs = getattr(shipped(), name).costs
    assert min(costs.values()) >= 0
    assert max(costs.values()) > 0


def test_every_shape_and_network_was_held_out():
    layers, nets = len(layer_calls()), len({case for case, _, _ in measured_networks()})
    cases = [getattr(shipped(), name).error.cases for name in MODELS]
    assert cases == [layers, layers, nets, nets]


def test_traced_networks_are_those_measured():
    calls = read_calls()
    assert set(calls) == {case for case, _, _ in measured_networks()}
    for case, (net, densities) in calls.items():
        on_spikes = case.startswith(("feed-forward", "recurrent"))
        assert set(densities) == set(net.names if on_spikes else net.names[1:])
        assert all(0 <= share <= 1 for share in densities.values())
        assert any(densities.values())


# ---- fitting


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), st.integers(0, 1000))
def test_fit_finds_the_costs_behind_exact_times(costs, seed):
    amounts = 1 + 10 * torch.rand(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    names = "abc"
    points = [
        Point("case", dict(zip(names, row, strict=True)), sum(c * a for c, a in zip(costs, row, strict=True)))
        for row in amounts.tolist()
    ]
    found = fit(points)
    assert all(value >= 0 for value in found.values())
    assert [Model(found, NOTHING).ms(point.terms) for point in points] == pytest.approx(
        [point.ms for point in points], rel=1e-4
    )


def test_fit_minimises_relative_errors():
    """Absolute errors would make a point of 1000 ms decide alone."""
    points = [Point("small", {"work": 1.0}, 1.0)] * 9 + [Point("large", {"work": 1000.0}, 2000.0)]
    assert fit(points)["work"] == pytest.approx((9 + 0.5) / (9 + 0.25), rel=1e-5)


def test_terms_without_amount_cost_nothing():
    assert fit([Point("a", {"call": 1.0, "never": 0.0}, 2.0)]) == {"call": 2.0, "never": 0.0}


def test_prediction_of_a_case_does_not_know_its_time():
    points = [Point(name, {"work": work}, work) for name, work in (("a", 1.0), ("a", 2.0), ("b", 3.0), ("c", 4.0))]
    changed = [point._replace(ms=10 * point.ms) if point.case == "a" else point for point in points]
    before, after = held_out(points), held_out(changed)
    assert before[:2] == after[:2] == pytest.approx([1.0, 2.0])
    assert after[2] > before[2] == pytest.approx(3.0)


def test_holding_out_needs_two_cases():
    with pytest.raises(ValueError, match="two cases or more, got 1"):
        held_out([Point("a", {"work": 1.0}, 1.0)] * 3)


def test_error_is_relative_to_the_measurement():
    points = [Point(str(index), {}, 10.0) for index in range(11)]
    found = error_of([10.0 + index for index in range(11)], points)
    assert found == Error(median=0.5, p90=0.9, cases=11, points=11)
    assert str(found) == "median 50%, 90 % below 90% (11 times of 11 held-out cases)"


def test_architectures_are_held_out_together():
    """Networks of one architecture, of two sizes each, that share a cost no other has."""
    costs = {"x": 1.0, "y": 5.0, "z": 9.0}
    points = [
        Point(f"{kind} @{size}", {"work": size}, size * cost) for kind, cost in costs.items() for size in (1.0, 2.0)
    ]
    error = fitted(points, lambda case: case.split(" @")[0]).error
    kinds = [point._replace(case=point.case[0]) for point in points]
    assert error.architecture_median == error_of(held_out(kinds), kinds).median
    assert error.architecture_median > error.median
    assert "on an architecture not seen" in str(error)
    assert fitted(points).error == dataclasses.replace(error, architecture_median=None)


def test_predictor_is_read_back(tmp_path):
    shipped().save(tmp_path / "predictor.json")
    assert Predictor.load(tmp_path / "predictor.json") == shipped()
    record = json.loads((tmp_path / "predictor.json").read_text()) | {"schema": 0}
    (tmp_path / "predictor.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="another schema"):
        Predictor.load(tmp_path / "predictor.json")


# ---- terms


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 64), st.sampled_from([1, 2, 4]))
def test_sparse_terms_grow_with_density(one, other, rows, groups):
    call = LayerCall(convolution(4, 8, groups=groups), rows)
    low, high = (sparse_terms(call, density) for density in sorted((one, other)))
    assert all(low[name] <= high[name] for name in low)


def test_at_density_one_everything_is_added_and_read():
    call = LayerCall(convolution(4, 8), 3)
    assert sparse_terms(call, 1.0)["additions"] == dense_terms(call)["multiply-adds"]
    assert sparse_terms(call, 1.0)["weights read"] == call.weights
    assert sparse_terms(call, 0.0)["additions"] == sparse_terms(call, 0.0)["weights read"] == 0


def test_windows_count_words_of_a_group():
    windows = [sparse_terms(LayerCall(convolution(128, 128, groups=g), 1), 0.1)["windows"] for g in (1, 4, 128)]
    assert windows == [36 * 9 * 2, 36 * 9 * 4, 0]


def test_single_vector_reorders_no_weights():
    shape = LayerShape("fc", 64, 10)
    assert [dense_terms(LayerCall(shape, rows))["weights reordered"] for rows in (1, 2)] == [0, 640]


CALL_ONLY = LayerModels(Model({"call": 1.0}, NOTHING), Model({"call": 2.0, "additions": 0.5}, NOTHING))


def test_accelerated_layer_takes_all_steps_at_once():
    shape = LayerShape("fc", 64, 10)
    assert fused_terms(LayerCall(shape, 2, 25), 0.1, CALL_ONLY) == fused_terms(LayerCall(shape, 50), 0.1, CALL_ONLY)
    assert fused_terms(LayerCall(shape, 2, 25), 0.1, CALL_ONLY)["spikes"] == pytest.approx(0.5 * 0.1 * 50 * 640)
    assert fused_terms(LayerCall(shape, 2, 25), 1.0, CALL_ONLY) == {
        "dense layers": 1.0,
        "layer calls": 1.0,
        "layer outputs": 500,
    }
    assert eager_terms(LayerCall(shape, 2, 25), CALL_ONLY) == {"layers": 25.0, "layer outputs": 500}


def test_terms_of_a_network_are_sums():
    one, two = LayerCall(LayerShape("one", 8, 8), 2), LayerCall(LayerShape("two", 8, 8), 2, 3)
    net, outputs = NetCall((one, two), neuron_steps=5), 8 * 8
    assert dense_net_terms(net, CALL_ONLY) == {"neuron steps": 5, "layers": 4.0, "layer outputs": outputs}
    found = accelerated_net_terms(net, {"two": 0.5}, CALL_ONLY)
    assert found == {
        "call": 1,
        "dense layers": 1.0,
        "layer calls": 2.0,
        "layer outputs": outputs,
        "spikes": 0.5 * 0.5 * 6 * 64,
    }


def test_a_recurrent_layer_is_called_at_every_step():
    shape = LayerShape("fc", 64, 10)
    one, all_steps = (fused_terms(LayerCall(shape, 2, *calls), 0.1, CALL_ONLY) for calls in ((), (25, 25)))
    assert all_steps == {name: 25 * amount for name, amount in one.items()}


def test_steps_are_split_into_equal_calls():
    with pytest.raises(ValueError, match="5 steps in 2 calls"):
        call_of([LayerShape("fc", 1, 1)], steps=5, calls=2)


# ---- a study

SHAPES = (
    convolution(2, 8, size=16),
    dataclasses.replace(convolution(8, 8, size=16), name="conv2"),
    LayerShape("fc", 512, 10),
)


def a_net(beta: float, seed: int, density: float, dense: str = LOOP) -> Net:
    choice = Choice("digits", "snntorch", Neuron.LIF, Surrogate.ARCTAN, beta, 1.0, None, Matched.BETA, seed)
    layers = tuple(Layer(shape, spikes=1.0, density=density) for shape in SHAPES)
    return Net(choice, Status.COMPLETE, steps=4, batch=2, layers=layers, dense=dense)


def a_study(dense: dict[str, float], accelerated: dict[str, float]) -> Study:
    """Networks whose measured times are exactly these costs."""
    nets = [a_net(beta, seed, 0.05 + beta / 4 + seed / 50) for beta in (0.5, 0.7, 0.9) for seed in (0, 1)]
    nets += [a_net(beta, 0, 0.3, "eager, multi-step") for beta in (0.4, 0.8)]
    measured = []
    for net in nets:
        calls = net.steps if net.dense == LOOP else 1
        call = call_of(SHAPES, steps=net.steps, batch=net.batch, calls=calls)
        densities = {layer.shape.name: layer.density for layer in net.layers[1:]}
        times = {
            "dense": Model(dense, NOTHING).ms(dense_net_terms(call, shipped().layers)),
            "accelerated": Model(accelerated, NOTHING).ms(accelerated_net_terms(call, densities, shipped().layers)),
        }
        latency = {path: (0.9 * ms, ms, 1.1 * ms) for path, ms in times.items()}
        measured.append(dataclasses.replace(net, latency=latency))
    return Study({}, tuple(measured))


def test_study_of_known_costs_is_predicted_exactly():
    study = a_study({"layers": 1.3, "neuron steps": 0.2}, {"call": 0.5, "spikes": 1.2})
    found = held_out_error(study)
    assert found["accelerated"].median < 0.01
    assert found["dense"].median < 0.01
    assert (found["dense"].cases, found["dense"].points) == (5, 8)


def test_seeds_of_a_choice_are_held_out_together():
    study = a_study({"layers": 1.0}, {"call": 1.0})
    cases = [point.case for point in points_of(study)["dense"]]
    assert len(cases) == 8
    assert len(set(cases)) == 5


def test_unfinished_and_unmeasured_networks_are_left_out():
    study = a_study({"layers": 1.0}, {"call": 1.0})
    first, second, *others = study.nets
    nets = (dataclasses.replace(first, status=Status.FAILED), dataclasses.replace(second, latency={}), *others)
    assert len(points_of(dataclasses.replace(study, nets=nets))["accelerated"]) == 6


def test_path_without_measurements_has_no_error():
    assert held_out_error(Study({}, (a_net(0.5, 0, 0.1),))) == {}


def test_error_of_stored_predictions():
    study = a_study({"layers": 1.0}, {"call": 2.0})
    nets = tuple(dataclasses.replace(net, predicted={"accelerated": 3.0}) for net in study.nets)
    found = prediction_error(dataclasses.replace(study, nets=nets))
    assert found == {"accelerated": Error(0.5, 0.5, 8, 8)}
