#!/bin/bash
# run.sh JOB OPTIONS: a job of ray_diffsynth on a Ray of its own, on the nodes of a SkyPilot task. Each node runs this; the
# first one is the head and the driver, and the others end when its Ray ends.
set -euo pipefail

NAME=$1
shift
mapfile -t NODES <<<"$SKYPILOT_NODE_IPS"
# SkyPilot has a Ray of its own on these nodes (port 6380, dashboard 8266), which `ray stop` would end as well.
PORT=${RAY_PORT:-6395}
HEAD=${NODES[0]}:$PORT
export RAY_AUTH_MODE=token # the token is RAY_AUTH_TOKEN
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # Ray ends when the job has: nothing is left to drain
unset RAY_ADDRESS

start() { # OPTIONS: `ray start` on this node, until it is ended
    exec ray start --block --disable-usage-stats --temp-dir "/tmp/ray-job-$SKYPILOT_NODE_RANK-$PORT" \
        --dashboard-agent-listen-port 0 "$@" </dev/null
}

head_answers() {
    (exec 3<>"/dev/tcp/${NODES[0]}/$PORT") 2>/dev/null
}

if [ "$SKYPILOT_NODE_RANK" -ne 0 ]; then
    until head_answers; do sleep 1; done
    (start --address "$HEAD") || true
    if head_answers; then
        echo "the Ray of this node ended before that of the head" >&2
        exit 1
    fi
    exit 0
fi

start --head --port "$PORT" --dashboard-host 127.0.0.1 --dashboard-port $((PORT + 1)) \
    --ray-client-server-port $((PORT + 2)) &
RAY=$!
trap 'kill "$RAY" 2>/dev/null; wait "$RAY" 2>/dev/null || true' EXIT
until python cluster/nodes.py "$HEAD" "$SKYPILOT_NUM_NODES"; do
    if ! kill -0 "$RAY" 2>/dev/null; then
        echo "the head did not start its Ray; its reason stands above" >&2
        exit 1
    fi
    if [ "$SECONDS" -ge 600 ]; then
        echo "after ten minutes not all of ${NODES[*]} have a Ray" >&2
        exit 1
    fi
    sleep 1
done
python "jobs/$NAME.py" --ray_address "$HEAD" "$@"
