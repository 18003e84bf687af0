"""Event streams: what a saccade shows, and that the class of a moving shape is in the order of events only."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sparseflow.study import events
from sparseflow.study.events import DIRECTIONS, moving_shapes, poisson, saccade_events

STEPS_OF = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
STEPS_OF |= {"down right": (1, 1), "up left": (-1, -1), "down left": (1, -1), "up right": (-1, 1)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestPoisson:
    def test_rate_is_brightness(self):
        images = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(500, 4)
        spikes = poisson(images, 40, generator())
        assert spikes.shape == (40, 500, 4)
        assert set(spikes.unique().tolist()) == {0.0, 1.0}
        assert torch.allclose(spikes.mean((0, 1)), images[0], atol=0.02)
        assert spikes[..., 0].sum() == 0
        assert spikes[..., 3].min() == 1

    def test_same_generator_same_spikes(self):
        images = torch.rand(3, 5)
        assert torch.equal(poisson(images, 4, generator(1)), poisson(images, 4, generator(1)))
        assert not torch.equal(poisson(images, 4, generator(1)), poisson(images, 4, generator(2)))


class TestSaccades:
    def test_without_contrast_there_are_no_events(self):
        assert saccade_events(torch.zeros(2, 1, 8, 8), 6).sum() == 0

    def test_binary_two_polarities_and_every_image_has_both(self):
        images = torch.rand(3, 1, 12, 12, generator=generator())
        seen = saccade_events(images, 9)
        assert seen.shape == (9, 3, 2, 12, 12)
        assert set(seen.unique().tolist()) == {0.0, 1.0}
        assert (seen.sum((0, 3, 4)) > 0).all()

    def test_edges_fire_and_plain_areas_do_not(self):
        image = torch.zeros(1, 1, 24, 24)
        image[..., 8:16, 8:16] = 1.0
        seen = saccade_events(image, 12).sum((0, 1, 2))
        assert seen[11:13, 11:13].sum() == 0, "the middle of the square sees no edge"
        assert seen[:3].sum() == 0
        assert seen[8:16, 6:9].sum() > 0

    def test_a_bright_square_going_by_is_on_and_then_off(self):
        """The first saccade goes down all the way, so that ON comes on one side of the square and OFF on the other."""
        image = torch.zeros(1, 1, 24, 24)
        image[..., 8:16, 8:16] = 1.0
        first = saccade_events(image, 12)[:4, 0].sum(0)
        rows = torch.arange(24.0)
        on, off = ((first[polarity].sum(1) * rows).sum() / first[polarity].sum() for polarity in (0, 1))
        assert (on - off).abs() > 3

    def test_higher_threshold_fewer_events(self):
        images = torch.rand(4, 1, 12, 12, generator=generator())
        counts = [saccade_events(images, 6, threshold=threshold).sum() for threshold in (0.1, 0.4, 1.6)]
        assert counts[0] > counts[1] > counts[2] > 0

    def test_noise_is_of_the_rate_asked_for_and_seeded(self):
        dark = torch.zeros(20, 1, 16, 16)
        seen = saccade_events(dark, 10, noise=0.05, generator=generator())
        assert seen.mean() == pytest.approx(0.05, rel=0.1)
        assert torch.equal(seen, saccade_events(dark, 10, noise=0.05, generator=generator()))

    @pytest.mark.parametrize("images", [torch.rand(2, 8, 8), torch.rand(2, 3, 8, 8)])
    def test_other_shapes_are_refused(self, images):
        with pytest.raises(ValueError, match=r"\[N, 1, H, W\]"):
            saccade_events(images, 4)

    def test_threshold_must_be_positive(self):
        with pytest.raises(ValueError, match="positive"):
            saccade_events(torch.rand(1, 1, 8, 8), 4, threshold=0.0)


def motion_energy(seen, step):
    """How much of each frame is the frame before, moved by ``step``: ``[N]``."""
    present = seen.sum(2).clamp(max=1)
    moved = present[:-1].roll(step, (2, 3))
    return (present[1:] * moved).sum((0, 2, 3))


def held_out_accuracy(features, labels):
    half = len(labels) // 2
    features = features.flatten(1).numpy()
    model = LogisticRegression(C=0.01, max_iter=1000).fit(features[:half], labels[:half])
    return model.score(features[half:], labels[half:])


class TestMovingShapes:
    @pytest.mark.parametrize("directions", [4, 8])
    @pytest.mark.parametrize("speed", [1, 2])
    def test_class_is_the_direction_of_motion(self, directions, speed):
        seen, labels = moving_shapes(60, 16, directions=directions, speed=speed, generator=generator())
        assert seen.shape == (16, 60, 2, 32, 32)
        assert set(seen.unique().tolist()) == {0.0, 1.0}
        steps = [STEPS_OF[name] for name in DIRECTIONS[:directions]]
        energies = torch.stack([motion_energy(seen, (down * speed, right * speed)) for down, right in steps])
        # An edge has nearly the same place in the next frame if it also moves along itself.
        assert (energies.argmax(0) == labels).float().mean() > (0.95 if directions == 4 else 0.75)

    @pytest.mark.parametrize("directions", [4, 8])
    def test_neither_the_sum_over_time_nor_a_frame_tells_the_class(self, directions):
        seen, labels = moving_shapes(1600, 16, size=16, directions=directions, generator=generator())
        chance, deviation = 1 / directions, (1 / directions * (1 - 1 / directions) / 800) ** 0.5
        for features in (seen.sum(0), seen[7]):
            assert held_out_accuracy(features, labels) < chance + 4 * deviation

    def test_sums_of_a_direction_and_its_opposite_have_the_same_moments(self):
        """What a linear model might miss: along the axis of motion, ON and OFF are as often on either side."""
        seen, labels = moving_shapes(3000, 6, size=16, directions=4, generator=generator())
        summed = seen.sum(0)
        lag = (summed[:, 0] * summed[:, 1].roll(1, 2)).sum((1, 2)) - (summed[:, 0] * summed[:, 1].roll(-1, 2)).sum(
            (1, 2)
        )
        right, left = lag[labels == 0], lag[labels == 1]
        error = (right.var() / len(right) + left.var() / len(left)).sqrt()
        assert (right.mean() - left.mean()).abs() < 4 * error

    def test_a_full_turn_leaves_the_same_sum_whichever_way_it_goes(self):
        shapes = events._shapes(40, 16, (3, 9), generator())
        sums = []
        for step in ((0, 1), (0, -1)):
            velocity = torch.tensor(step).expand(40, 2)
            edges = events._edges(shapes, velocity)
            sums.append(sum(events._rolled(edges, moment * velocity).int() for moment in range(16)))
        assert sums[0].sum() > 0
        assert torch.equal(*sums)

    def test_size_noise_and_number_can_be_chosen(self):
        small, _ = moving_shapes(50, 8, shape_size=3, generator=generator())
        large, _ = moving_shapes(50, 8, shape_size=(11, 11), generator=generator())
        noisy, _ = moving_shapes(50, 8, shape_size=3, noise=0.02, generator=generator())
        assert small.sum() < large.sum()
        assert noisy.mean() - small.mean() == pytest.approx(0.02, rel=0.15)
        assert moving_shapes(7, 8, size=16)[0].shape == (8, 7, 2, 16, 16)

    def test_same_generator_same_events(self):
        first, second = (moving_shapes(5, 6, generator=generator(3)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"directions": 6}, "4 or 8"),
            ({"speed": 16}, "half the size"),
            ({"speed": 0}, "positive"),
            ({"shape_size": 40}, "below the size"),
            ({"shape_size": (9, 5)}, "increasing"),
        ],
    )
    def test_senseless_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            moving_shapes(2, 4, **options)
