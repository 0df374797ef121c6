#!/bin/bash
# Ray 2.60.0: ray.data.read_parquet(columns=[a name that is not in the file]) gives rows of __bsp_stub.
#
# Guess: an error that names the column, as pyarrow's own scanner and pandas raise.
# What happens: the rows come without the column; when no other is asked for, as rows of a column that nobody wrote.
# Seen: [{'__bsp_stub': None}, {'__bsp_stub': None}].
. "$(dirname "$0")/lib.sh"
install "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1
run <<'P'
import pyarrow as pa
import pyarrow.parquet as pq
import ray

pq.write_table(pa.table({"prompt": ["a", "b"]}), "a.parquet")
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
seen = ray.data.read_parquet("a.parquet", columns=["promt"]).take_all()
print(seen)
assert [list(row) for row in seen] == [["__bsp_stub"]] * 2, seen
P
