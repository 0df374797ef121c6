"""The machines of stage 1: asked for when there is something for them to do, and not before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ray_diffsynth.cluster.encoders import EncoderPool, encoder_demand, encoder_pools, scan_demand
from ray_diffsynth.cluster.joined import joined_cluster
from ray_diffsynth.cluster.nodes import Process, room
from ray_diffsynth.cluster.request import Requester, requester
from ray_diffsynth.cluster.wait import sized_when_there, wait_for
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.ray_compat import autoscaler


class Machines:
    """Waits for the machines of each part of a run, and says what its actors and tasks reserve there."""

    def __init__(self, config: PreprocessConfig, wanted: Requester) -> None:
        self._config, self._requester = config, wanted
        self._begun = False

    def up(self) -> bool:
        """Whether a machine is there on which tasks that read headers can be."""
        (ask,) = scan_demand(self._config, cluster := joined_cluster()).asks
        return room(ask.process.resources, cluster.select(ask.process.selector).staying) > 0

    def for_scan(self) -> Process:
        """What a task that reads headers reserves, once there is room for one."""
        demand = scan_demand(self._config, joined_cluster())
        wait_for(demand, self._requester, minutes=self._config.wait_minutes)
        return demand.asks[0].process

    def for_encoding(self, runs: Sequence[GroupRun]) -> dict[str, EncoderPool]:
        """The pools of those groups that have something to encode, once there is room for them.

        The first that encode wait for the least number of their actors; later ones begin with one, as a machine that
        was lost meanwhile may not come again. What is wanted is taken back then: Ray Data asks for more by itself.
        """
        runs = [run for run in runs if run.shards]
        if not runs:
            return {}
        size = partial(encoder_pools, self._config, [run.name for run in runs], growing=autoscaler() is not None)
        fixed = self._config.worker_range != (0, 0) or self._config.pools is not None
        shards = {run.name: len(run.shards) for run in runs}
        demand = partial(encoder_demand, shards=shards, least=fixed and not self._begun)
        pools: dict[str, EncoderPool] = sized_when_there(
            size, demand, self._requester, minutes=self._config.wait_minutes
        )
        self._begun = True
        return pools


@contextmanager
def machines_of(config: PreprocessConfig, groups: Sequence[str], cache: str) -> Iterator[Machines]:
    """The machines of a run that writes a cache; what it asked for is taken back at the end, however that comes.

    Raises ClusterError for pools of the groups that do not fit a cluster that stays as it is.
    """
    if autoscaler() is None and (cluster := joined_cluster()).select(config.selector).nodes:
        encoder_pools(config, groups, cluster)
    with requester(f"preprocess {cache}") as wanted:
        yield Machines(config, wanted)
