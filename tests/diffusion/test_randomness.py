from __future__ import annotations

import numpy as np
import pytest
import torch

from ray_diffsynth.diffusion.randomness import (
    SampleKey,
    generator,
    permutation,
    sample_noise,
    sample_timestep_index,
    uniform,
)

KEY = SampleKey(seed=0, epoch=1, repeat=0, sample_id="a.png")


def test_draws_follow_the_key_and_not_the_order_or_the_global_generator() -> None:
    first = sample_noise((1, 4, 8, 8), KEY)
    torch.manual_seed(123)
    torch.randn(7)
    state = torch.random.get_rng_state()
    sample_noise((1, 4, 8, 8), SampleKey(0, 1, 0, "b.png"))
    assert torch.equal(sample_noise((1, 4, 8, 8), KEY), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.dtype == torch.float32


@pytest.mark.parametrize(
    "other",
    [SampleKey(*parts) for parts in ((1, 1, 0, "a.png"), (0, 2, 0, "a.png"), (0, 1, 1, "a.png"), (0, 1, 0, "ä.png"))],
)
def test_each_part_of_the_key_counts(other: SampleKey) -> None:
    assert not torch.equal(sample_noise((1, 4), KEY), sample_noise((1, 4), other))
    assert uniform("timestep", KEY) != uniform("timestep", other)


def test_keys_are_unambiguous() -> None:
    keys = [("p", 1), ("p", "1"), ("p", 1, None), ("p1",), ("p", "ab"), ("p", "a", "b")]
    values = [uniform(*key) for key in keys]
    assert len(set(values)) == len(values)
    assert uniform("p", np.int64(1)) == uniform("p", 1)
    with pytest.raises(TypeError, match="cannot hold a object"):
        uniform("p", object())


def test_draws_are_pinned() -> None:
    """A change here changes every run: raise it in the changelog."""
    assert uniform("timestep", KEY) == 0.8934235329112996
    assert permutation(6, "plan", 0, 1).tolist() == [3, 0, 4, 2, 1, 5]


def test_uniform_is_uniform() -> None:
    values = np.array([uniform("u", i) for i in range(4000)])
    assert values.min() >= 0 and values.max() < 1
    assert np.allclose(np.histogram(values, bins=8, range=(0, 1))[0], 500, atol=100)


def test_permutation() -> None:
    order = permutation(1000, "plan", 3)
    assert sorted(order.tolist()) == list(range(1000)) and order.dtype == np.int64
    assert order.tolist() != permutation(1000, "plan", 4).tolist()
    assert permutation(0, "plan").tolist() == []


def test_noise_is_standard_normal() -> None:
    noise = torch.cat([sample_noise((1, 1000), SampleKey(0, 0, 0, str(i))) for i in range(50)])
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02


def test_generator_is_fresh_each_time() -> None:
    draws = [torch.rand(1, generator=generator("x", 1)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_timestep_index_covers_the_boundary_range() -> None:
    drawn = {sample_timestep_index(10, SampleKey(0, 0, 0, str(i)), 0.25, 0.8) for i in range(300)}
    assert drawn == set(range(2, 8))
    assert {sample_timestep_index(3, SampleKey(0, 0, 0, str(i))) for i in range(50)} == {0, 1, 2}


@pytest.mark.parametrize(("lo", "hi"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.0, 0.01)])
def test_an_empty_range_is_an_error(lo: float, hi: float) -> None:
    with pytest.raises(ValueError, match="min_timestep_boundary"):
        sample_timestep_index(10, KEY, lo, hi)
