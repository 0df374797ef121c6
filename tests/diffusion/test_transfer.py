"""Tensors in lists are reached too: latents of images of several sizes."""

from __future__ import annotations

import torch

from ray_diffsynth.cache.schema import rows_from_table, table_from_rows
from ray_diffsynth.diffusion.transfer import map_tensors


def test_every_tensor_of_a_value_is_changed() -> None:
    one = torch.ones(2)
    found = map_tensors(lambda tensor: tensor.double(), {"a": [one, (one, "text")], "b": 3, "c": None})
    assert found["a"][0].dtype == found["a"][1][0].dtype == torch.float64
    assert found["a"][1][1] == "text" and found["b"] == 3 and found["c"] is None
    assert map_tensors(lambda tensor: tensor + 1, one).tolist() == [2, 2]


def test_a_list_of_latents_comes_back_from_the_cache() -> None:
    latents = [torch.randn(1, 16, 4, 6, dtype=torch.bfloat16), torch.randn(1, 16, 8, 2, dtype=torch.bfloat16)]
    table = table_from_rows(["k"], [{"edit_latents": latents}], ["edit_latents"], codec="planes-zstd")
    ((_, row),) = rows_from_table(table, codec="planes-zstd")
    assert [torch.equal(a, b) for a, b in zip(row["edit_latents"], latents, strict=True)] == [True, True]
