#!/bin/bash
# Ray 2.60.0: a dataset that runs takes back what its own program asked the autoscaler for.
#
# Guess: ray.autoscaler.sdk.request_resources stays until the next call of it, as its docstring says; work that follows
#   does not touch it.
# What happens: Ray Data (and Ray Train) send their own demand through one detached actor, which calls the same function
#   with the sum of what it knows. That sum replaces the request of the program, and when the dataset is done it is empty.
# Seen: asked [{"GPU": 4}]; after a dataset [].
. "$(dirname "$0")/lib.sh"
install "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1
run <<'P'
import json
import time

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get


def asked():
    return json.loads(_internal_kv_get("autoscaler_resource_request") or "null")


ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
request_resources(bundles=[{"GPU": 4}])
before = asked()
ray.data.range(1000, override_num_blocks=8).map(lambda row: time.sleep(0.01) or row).materialize()
for _ in range(60):
    if asked() != before:
        break
    time.sleep(1)
time.sleep(5)
print("asked", before, "after a dataset", asked())
assert before == [{"GPU": 4}] and {"GPU": 4} not in (asked() or []), asked()
P
