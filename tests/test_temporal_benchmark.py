"""The benchmark of temporal aggregation, on a few samples: what it compares is what it says."""

from __future__ import annotations

import dataclasses

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
def test_every_method_is_trained_and_converted(make):
    data = few(make())
    assert not torch.equal(data.train[0][:, :8], data.test[0][:, :8])
    rows = list(temporal.training(data, seeds=1))
    trained = [(row["method"], row["K"]) for row in rows if "method" in row]
    assert trained == [("exact", 1), ("collapse", 4), ("preserve", 4)]
    asked = [row["asked"] for row in rows if "asked" in row]
    assert asked == ["collapse", "preserve", "auto"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_speed_has_both_baselines():
    rows = {row["method"]: row for row in temporal.speed(repeats=2)}
    assert rows.keys() == {"T calls", "one batched call", "collapse 4", "preserve 4", "one batched call, compiled"}
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
