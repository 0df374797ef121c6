"""Whether a cache is that of the dataset at hand: by the ids of its samples, else by what its images hold.

Data that was moved has other ids (a tar elsewhere, absolute paths, a sub-folder) and the same contents.
"""

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.data.metadata import Metadata
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.plan.cache_keys import GroupPlan
from ray_diffsynth.preprocess.samples import Samples

LOOKED_AT = 1000
"""Rows whose files are read to recognise a dataset by its contents, spread over all of it."""


def check_same_dataset(
    cache: str,
    index: pa.Table | None,
    metadata: Metadata,
    groups: Sequence[GroupPlan],
    scan: Callable[[Metadata], Samples],
) -> None:
    """Raise CacheError if `cache` holds the cache of another dataset, before anything is written.

    `scan`: the samples of some rows, by reading their files; it is asked only where no id is known.
    """
    if index is None or not len(index) or not len(metadata.table):
        return
    known = index["sample_id"]
    if pc.any(pc.is_in(metadata.table["sample_id"], known.combine_chunks())).as_py():
        return
    part = _spread(metadata, LOOKED_AT)
    with collecting():  # all that is to be said of the files is said by the whole scan
        samples = scan(part)
    if any(_holds(index, group, samples) for group in groups if group.bucketed):
        return
    raise CacheError(
        f"{cache} already holds the cache of another dataset ({len(known)} samples, such as {known[0]}, none "
        f"of which is in this one of {len(metadata.table)} rows, such as {metadata.table['sample_id'][0]}; of "
        f"{len(samples)} whose files were looked at, none has a content that it was encoded from by these models); "
        "choose another --output_path, or give --replace_dataset, which keeps of the old one what both share"
    )


def _spread(metadata: Metadata, count: int) -> Metadata:
    """So many rows at equal distances, the first among them; all where there are no more."""
    total = len(metadata.table)
    places = [at * total // count for at in range(count)] if total > count else range(total)
    table = metadata.table.take(pa.array(places, pa.int64()))
    return Metadata(table, metadata.columns, [], total=len(table))


def _holds(index: pa.Table, group: GroupPlan, samples: Samples) -> bool:
    """Whether the cache holds a row of the group for one of the samples."""
    name = f"{group.name}_key"
    if name not in index.column_names:
        return False
    keys = pa.array({group.key(inputs) for inputs in samples.inputs(group.inputs)}, pa.string())
    return bool(pc.any(pc.is_in(index[name], keys)).as_py())
