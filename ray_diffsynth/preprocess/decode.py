"""The decode task: opens the files of a shard's rows."""

import json
import logging
from typing import Any

from ray_diffsynth.cluster.environment import Environment, Shipped
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.media import TRANSIENT
from ray_diffsynth.data.samples import ERRORS_OF_ALL_SAMPLES, load_inputs
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.preprocess.errors import described
from ray_diffsynth.preprocess.messages import EncoderSpec, give_up, pack, unanswered
from ray_diffsynth.preprocess.monitor import OutOfTries, attempt_at

logger = logging.getLogger(__name__)


class Decoder(Shipped):
    """CPU task: shard -> shard with the inputs of its rows. Those not decoded are in `failed` or `transient`."""

    def __init__(
        self,
        spec: EncoderSpec,
        monitor: Any = None,
        environment: Environment | None = None,
        tries: int | None = None,
    ) -> None:
        self.environment = environment
        self.tries = tries
        self.spec = spec
        self.monitor = monitor

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        try:
            with attempt_at(self.monitor, shard["name"], "decode", self.tries):
                return self._decode(shard)
        except OutOfTries:
            return unanswered(shard)
        except ERRORS_OF_ALL_SAMPLES as error:
            return give_up(shard, self.monitor, str(error))
        except Exception as error:
            # Whatever is raised here would only make Ray Data drop the shard.
            logger.exception("shard %s cannot be decoded", shard["name"])
            why = f"the inputs of {self.spec.group.name} cannot be read: {described(error)}"
            return give_up(shard, self.monitor, why)

    def _decode(self, shard: dict[str, Any]) -> dict[str, Any]:
        keys: list[str] = []
        rows: list[dict[str, Any]] = []
        failed: dict[str, list[str]] = {}
        transient: dict[str, list[str]] = {}
        warnings: dict[str, list[tuple[str, str]]] = {}
        for item in json.loads(shard["rows"]):
            size = Bucket.parse(item["size"])
            try:
                with collecting() as collected:
                    found = load_inputs(
                        item["row"], size, self.spec.plan.sample, only=self.spec.group.inputs, digests=item["digests"]
                    )
            except ERRORS_OF_ALL_SAMPLES:
                raise
            except (*TRANSIENT, MemoryError) as error:
                transient[item["key"]] = [type(error).__name__, str(error) or "too little memory to decode it"]
            except Exception as error:
                logger.debug("%s cannot be decoded", item["sample_id"], exc_info=True)
                failed[item["key"]] = [type(error).__name__, str(error)]
            else:
                keys.append(item["key"])
                rows.append(found)
                if collected:
                    warnings[item["key"]] = [(warning.kind, warning.detail) for warning in collected]
        more = {"failed": json.dumps(failed), "transient": json.dumps(transient), "warnings": json.dumps(warnings)}
        return {**shard, "inputs": pack(keys, rows, self.spec.group.inputs), **more}
