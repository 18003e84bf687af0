"""The benchmark of temporal aggregation, on a few samples: what it compares is what it says."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import temporal


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(temporal, "SIZES", (4,))
    monkeypatch.setattr(temporal, "_compiled", lambda net, x: temporal._inference(net, x))


def few(data):
    def cut(part, count):
        return part[0][:, :count], part[1][:count]

    return dataclasses.replace(
        data, train=cut(data.train, 64), validation=cut(data.validation, 16), test=cut(data.test, 32), epochs=1
    )


def test_calls_one_after_another_are_the_batched_call():
    torch.manual_seed(0)
    net = temporal.Net(1, 10).eval()
    x = temporal.rate_coded(temporal.digits()[2][0][:4])
    with torch.no_grad():
        batched = temporal.run(net, x)
        torch.testing.assert_close(temporal.run(temporal.Sequential(net), x), batched)


@pytest.mark.parametrize(("method", "size"), [("collapse", 4), ("preserve", 4)])
def test_temporal_networks_see_fewer_frames(method, size):
    net = temporal.Net(2, 4, method, size).eval()
    seen = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape))
    temporal.run(net, torch.rand(16, 3, 2, 16, 16))
    frames = [shape.numel() // shape[-1] // shape[-2] // shape[-3] // 3 for shape in seen]
    assert frames == [4, 4]


@pytest.mark.parametrize("make", [temporal.rate, temporal.motion, temporal.events])
def test_every_method_is_trained_and_the_exact_network_kept(make, monkeypatch, tmp_path):
    monkeypatch.setattr(temporal, "WEIGHTS", tmp_path)
    data = few(make())
    assert not torch.equal(data.train[0][:, :8], data.test[0][:, :8])
    rows = list(temporal.training(data, seeds=[3]))
    methods = [("exact", 1), ("collapse", 4), (temporal.LEARNED, 4), ("preserve", 4)]
    assert [(row["method"], row["K"], row["seed"]) for row in rows] == [(*method, 3) for method in methods]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert temporal.accuracy(temporal._exact(data, 3), *data.test) == rows[0]["accuracy"]


def test_weights_of_the_frames_are_learned():
    data = few(temporal.rate())
    net = temporal.Net(1, 10, temporal.LEARNED, 4)
    before = net.body[0].weights().detach().clone()
    temporal.trained(net, data, seed=0)
    assert not torch.allclose(net.body[0].weights(), before)


def test_conversions_take_kept_networks(monkeypatch, tmp_path):
    monkeypatch.setattr(temporal, "WEIGHTS", tmp_path)
    for name in ("rate", "motion", "events"):
        data = few(getattr(temporal, name)())
        monkeypatch.setattr(temporal, name, lambda data=data: data)
        torch.save(temporal._net(data).state_dict(), temporal._weights(data, 0))
    monkeypatch.setattr(temporal, "trained", None)  # nothing is trained
    rows = list(temporal.conversions([0]))
    assert [row["asked"] for row in rows] == 3 * ["collapse", "preserve", "auto"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_rows_of_other_seeds_stay(tmp_path):
    path = tmp_path / "temporal.json"
    for seed, accuracy in ((0, 0.1), (1, 0.2), (0, 0.3)):
        temporal._save(path, "rate", [{"seed": seed, "accuracy": accuracy}], [seed])
    temporal._save(path, "speed", [{"method": "old"}, {"method": "older"}], [0])
    temporal._save(path, "speed", [{"method": "new"}], [0])
    found = json.loads(path.read_text())
    assert [(row["seed"], row["accuracy"]) for row in found["rate"]] == [(1, 0.2), (0, 0.3)]
    assert [row["method"] for row in found["speed"]] == ["new"]


def test_speed_has_both_baselines():
    rows = {row["method"]: row for row in temporal.speed(repeats=2)}
    ours = {"collapse 4", f"{temporal.LEARNED} 4", "preserve 4"}
    assert rows.keys() == {"T calls", "one batched call", *ours, "one batched call, compiled"}
    assert rows["one batched call, compiled"]["training ms"] is None
    assert all(row["inference ms"][1] > 0 for row in rows.values())


def test_decisions_are_the_right_ones(monkeypatch):
    """All of them on the committed data; here one of each kind."""
    kinds = {}
    for name, right, x in temporal._variants():
        kinds.setdefault(name.split()[0], (name, right, x))
    monkeypatch.setattr(temporal, "_variants", lambda: iter(kinds.values()))
    rows = list(temporal.decisions())
    assert len(rows) >= 4
    assert [row["mode"] for row in rows] == [row["right"] for row in rows]
