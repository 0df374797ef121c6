"""A file that takes much memory to decode, on a machine that has little: it has a pass and a reservation of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from ray_diffsynth.cache.inspection import inspect_cache
from tests.preprocess.conftest import Job
from tests.preprocess.counting import build_model, calls

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_large_image_is_decoded_by_itself_and_one_too_large_is_named(tmp_path: Path, few: Path, job: Job) -> None:
    from ray.cluster_utils import Cluster

    data = Path(shutil.copytree(few, tmp_path / "data"))
    Image.new("RGB", (4000, 4000), "red").save(data / "large.png")  # about 0.1 GB
    Image.new("L", (18000, 18000)).save(data / "huge.png")  # 0.3 GB
    with open(data / "metadata.csv", "a", encoding="utf-8") as file:
        file.write("huge.png,caption\nlarge.png,caption\n")
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    head = {"num_cpus": 2, "memory": 300 * 10**6, "object_store_memory": 200 * 10**6, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        running = job(model, data, cache, "--ray_address", cluster.address, "--max_quarantine", "0.5")
        assert running.process.wait() == 0
    finally:
        cluster.shutdown()
    log = running.log.read_text()
    assert "vae: 1 samples lie in files so large that fewer are decoded at a time" in log
    assert "vae: 1 samples are left out; of the first: it is too large to decode here" in log
    facts = inspect_cache(str(cache))
    assert (facts["samples"], facts["duplicates"], facts["quarantined"]) == (13, 0, 1)
    assert len(calls(model, "vae")) == 13
    assert "quarantined huge.png: TooLargeToDecode" in log
