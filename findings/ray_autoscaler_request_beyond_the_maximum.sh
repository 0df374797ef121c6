#!/bin/bash
# Ray 2.60.0: a request for more than the cluster may become starts no node at all.
#
# Guess: who asks by request_resources for five nodes of a type of which there may be four gets four, and hears of the fifth.
# What happens: the autoscaler (v2) takes a request whole or not at all, and as there is one for the whole cluster, the sum of
#   what all ask for, one program that asks for too much keeps every other one waiting. Tasks and actors that wait in the
#   queue are placed one by one: of five, four get their node.
# Seen: asked for 4: 4 nodes; asked for 5: 0 nodes; 5 tasks in the queue: 4 nodes.
. "$(dirname "$0")/lib.sh"
install "ray[default]==2.60.0"
run <<'P'
import logging

from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

logging.disable(logging.WARNING)


def nodes(count, *, asked):
    wanted = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1})] * count)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={"gpu": NodeTypeConfig("gpu", 0, 4, resources={"CPU": 1, "GPU": 1})},
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=wanted)] if asked else [],
        resource_requests=[] if asked else wanted,
    )
    return sum(launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch)


seen = nodes(4, asked=True), nodes(5, asked=True), nodes(5, asked=False)
print("asked for 4: %d nodes; asked for 5: %d nodes; 5 tasks in the queue: %d nodes" % seen)
assert seen == (4, 0, 4), seen
P
