"""What is tried again of the shards that a pass lost: as they were, in smaller parts, or not at all."""

from collections import Counter as Tally
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ray_diffsynth.preprocess.attempts import Unfinished, on_living_nodes
from ray_diffsynth.preprocess.errors import EncoderError
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, halves, split

RETRIES = 2
"""How often a decode task or an encoder's call is tried again when its process died, before its shard is cut in two."""
NODES = 5
"""Machines that may go down with an attempt at the same shard, before the run ends with an error."""


@dataclass
class Losses:
    """The lost shards of a group. unexplained: how often each was lost although no process died while it had it."""

    group: str
    unexplained: Tally[str] = field(default_factory=Tally)

    def next_attempt(
        self,
        shard: ShardPlan,
        attempts: Sequence[Unfinished],
        living: Collection[str],
        *,
        retries: int,
        node_lost: bool,
    ) -> list[ShardPlan] | Failure:
        """What is tried next of a lost shard; for a single row that killed its process each time, the failure.

        `attempts`: all at it that have not ended, also of passes before. `living`: the machines that are
        known to live. `retries`: how often this pass tried again. `node_lost`: whether a machine was lost during it.

        Only a process that died while its machine lives counts against the shard, and only when that happened more
        than `retries` times. Raises EncoderError where it is not the samples' fault.
        """
        own = on_living_nodes(attempts, living)
        if len(own) > retries:
            return self._smaller(shard, own[-1])
        with_node = [item for item in attempts if item not in own]
        if len(with_node) >= NODES:
            names = ", ".join(row.sample_id for row in shard.rows[:3])
            raise EncoderError(
                f"{len(with_node)} machines went down while they worked on the same {len(shard.rows)} rows of "
                f"{self.group} (the first: {names}); see whether they lack memory, and run again: what is written is "
                "kept"
            )
        if not node_lost:
            self.unexplained[shard.name] += 1
        if self.unexplained[shard.name] > RETRIES:
            raise EncoderError(
                f"Ray lost a shard of {self.group} {self.unexplained[shard.name]} times although no process died often "
                "enough while it worked on it; see Ray's logs, and run again: what is written is kept"
            )
        return [shard]

    def _smaller(self, shard: ShardPlan, last: Unfinished) -> list[ShardPlan] | Failure:
        if len(shard.rows) > 1:
            return split(shard, last.batch) or halves(shard)
        stage = last.attempt.stage
        if stage == "write":
            raise EncoderError(
                f"the process that writes {self.group} died each time; the machine may lack memory: see Ray's logs, "
                "and run again: what is written is kept"
            )
        why = f" ({last.exit_reason})" if last.exit_reason else ""
        if stage == "decode":
            return Failure("DecoderDied", f"the decoding process died each time it reached this sample{why}")
        return Failure("EncoderDied", f"the encoding process died each time it reached this sample{why}")
