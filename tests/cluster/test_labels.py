"""What a selector of labels means; where Ray decides, Ray is asked."""

from __future__ import annotations

import pytest
from ray._private.label_utils import validate_label_key, validate_label_selector

from ray_diffsynth.cluster.labels import described, matches
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.errors import ConfigError

CONDITIONS = ("a", "!a", "in(a,b)", "in(a, b)", "!in(a,b)", "in(a)", "a-b.c_d", "1")
NO_CONDITIONS = ("", "-a", "a-", "in()", "in(a,", "!!a", "a b", "in(a;b)", "x" * 64)
NO_LABELS = ("", "-a", "a/", "a b", "a/b/c")


@pytest.mark.parametrize(
    ("labels", "meant"),
    [
        ({"k": "a"}, {"a", "in(a,b)", "in(a, b)", "in(a)"}),
        ({"k": "b"}, {"!a", "in(a,b)", "in(a, b)"}),
        ({"k": "c"}, {"!a", "!in(a,b)"}),
        ({}, {"!a", "!in(a,b)"}),
    ],
)
def test_which_machines_are_meant(labels: dict[str, str], meant: set[str]) -> None:
    assert {condition for condition in CONDITIONS[:6] if matches(labels, {"k": condition})} == meant
    assert matches(labels, {}) and not matches(labels, {"k": "a", "other": "b"})


def test_a_condition_is_one_that_ray_takes() -> None:
    for condition in CONDITIONS:
        assert validate_label_selector({"k": condition}) is None
        assert TrainConfig(model="m", dataset_base_path="c", node_labels={"k": condition}).selector == {"k": condition}
    for condition in NO_CONDITIONS:
        with pytest.raises(ConfigError, match="node_labels: k=.* is no condition; write a value"):
            TrainConfig(model="m", dataset_base_path="c", node_labels={"k": condition})
        assert not condition or validate_label_selector({"k": condition})  # an empty one means any value in Ray
    for label in NO_LABELS:
        with pytest.raises(ConfigError, match="is no name of a label"):
            TrainConfig(model="m", dataset_base_path="c", node_labels={label: "a"})
        assert validate_label_key(label)


def test_an_accelerator_is_a_label() -> None:
    config = TrainConfig(model="m", dataset_base_path="c", accelerator_type="H100", node_labels={"stage": "train"})
    assert config.selector == {"stage": "train", "ray.io/accelerator-type": "H100"}
    assert described(config.selector) == " with stage=train, ray.io/accelerator-type=H100"
    with pytest.raises(ConfigError, match="give one of the two"):
        TrainConfig(
            model="m", dataset_base_path="c", accelerator_type="H100", node_labels={"ray.io/accelerator-type": "A100"}
        )
