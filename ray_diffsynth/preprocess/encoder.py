"""The encoding actor: loads the models of one group once, and runs its units on shards."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from ray_diffsynth.cluster.living import living
from ray_diffsynth.cluster.session import own_device
from ray_diffsynth.data.warnings import DataWarnings, collecting
from ray_diffsynth.preprocess.attempts import Attempt
from ray_diffsynth.preprocess.encode_batches import DeviceError, encode_samples
from ray_diffsynth.preprocess.errors import EncoderError, described
from ray_diffsynth.preprocess.messages import EncoderSpec, give_up, pack, unanswered, unpack
from ray_diffsynth.preprocess.monitor import OutOfTries, attempt_at, end_this_process
from ray_diffsynth.preprocess.records import Failure

logger = logging.getLogger(__name__)

LOADS = 4
"""How often an actor may die while it loads its models."""


def died_loading(nodes: Sequence[str]) -> int:
    """How often an actor died by itself while it loaded. `nodes`: where it began to; the last time is the current one.

    What died with its machine does not count.
    """
    before = nodes[:-1]
    if len(before) < LOADS:  # most of the time: the machines need not be asked
        return len(before)
    alive = living(set(before))
    return sum(node in alive for node in before)


class Encoder:
    """Actor: shard with inputs -> shard with the encoded parameters in their place."""

    def __init__(self, spec: EncoderSpec, monitor: Any = None, tries: int | None = None) -> None:
        self.spec = spec
        self.tries = tries
        self.monitor = monitor
        self.batch_sizes: dict[str, int] = {}
        try:
            self._load()
        except Exception as error:
            # Ray starts the actor again without reporting the error, and Ray Data would wait for it for ever.
            if monitor is not None:
                reason = f"the encoder of {spec.group.name} cannot be loaded: {described(error)}"
                ray.get(monitor.report.remote("give_up", reason))
            raise

    def _load(self) -> None:
        spec = self.spec
        if self.monitor is not None:
            context = ray.get_runtime_context()
            own = (context.get_actor_id(), context.get_node_id(), context.get_worker_id())
            begun = ray.get(self.monitor.report.remote("begin_loading", *own))
            if died_loading(begun) >= LOADS:
                raise EncoderError(
                    "its process died each time while it loaded its models; the machine may lack memory for them (see "
                    "Ray's logs, or run with --verbose), or lower the number of actors"
                )
        name = spec.group.name
        models = spec.plan.split.group(name).models
        plan = spec.plan.on_this_machine(models)
        dtype: torch.dtype = getattr(torch, plan.config.dtype)
        self.pipe = plan.pipeline.from_pretrained(plan.source, models=models, device=own_device(), torch_dtype=dtype)
        self.pipe.scheduler.set_timesteps(1000, training=True)
        self.group = next(group for group in plan.split.stages(self.pipe).groups if group.name == name)
        if self.monitor is not None:
            context = ray.get_runtime_context()
            self.monitor.report.remote("loaded", context.get_actor_id(), context.get_worker_id())
            self._say_that_it_runs()

    def _say_that_it_runs(self) -> None:
        if self.monitor is not None:
            context = ray.get_runtime_context()
            self.monitor.running.remote(context.get_actor_id(), context.current_actor)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        if shard["given_up"]:
            return shard
        try:
            return self._attempt(shard)
        except OutOfTries:
            return unanswered(shard)

    def _attempt(self, shard: dict[str, Any]) -> dict[str, Any]:
        self._say_that_it_runs()
        with attempt_at(self.monitor, shard["name"], "encode", self.tries) as attempt:
            try:
                return self._encode(shard, attempt)
            except DeviceError as error:
                logger.error("the device is lost, so this process ends: %s", error)
                end_this_process(self.monitor, attempt, str(error))
                raise
            except Exception as error:
                # Whatever is raised here would only make Ray Data drop the shard.
                logger.exception("shard %s cannot be encoded", shard["name"])
                return give_up(shard, self.monitor, f"{self.spec.group.name} could not be encoded: {described(error)}")

    def _encode(self, shard: dict[str, Any], attempt: Attempt | None) -> dict[str, Any]:
        rows = unpack(shard["inputs"])
        inputs, size = [values for _, values in rows], self.batch_sizes.get(shard["bucket"], self.spec.batch_size)

        def on_batch(start: int, end: int) -> None:
            if attempt is not None:
                self.monitor.report.remote("begin_batch", attempt, [key for key, _ in rows[start:end]])

        with collecting() as collected:
            results, self.batch_sizes[shard["bucket"]] = encode_samples(
                self.pipe, self.group, self.spec.group.settings, inputs, size, on_batch
            )
        failed: dict[str, list[str]] = json.loads(shard["failed"])
        good: dict[str, dict[str, Any]] = {}
        for (key, _), result in zip(rows, results, strict=True):
            if isinstance(result, Failure):
                failed[key] = [result.error, result.message]
            else:
                good[key] = result
        packed = pack(list(good), list(good.values()), self.group.parameters)
        warnings = json.dumps(_by_key(collected, rows, json.loads(shard["warnings"])))
        return {**shard, "inputs": packed, "failed": json.dumps(failed), "warnings": warnings}


def _by_key(
    collected: DataWarnings, rows: Sequence[tuple[str, Mapping[str, Any]]], known: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, list[tuple[str, str]]]:
    """`known` and the warnings of the units, by row (units name it by its caption); those of no row have the key ""."""
    found = {key: [(kind, detail) for kind, detail in pairs] for key, pairs in known.items()}
    of_text: dict[str, list[str]] = {}
    for key, values in rows if collected else ():
        for text in {value for value in values.values() if isinstance(value, str) and value}:
            of_text.setdefault(text, []).append(key)
    for warning in collected:
        keys = of_text.get(warning.sample_id)
        detail = warning.detail if keys or not warning.sample_id else f"{warning.sample_id}: {warning.detail}"
        for key in keys or [""]:
            found.setdefault(key, []).append((warning.kind, detail))
    return found
