"""`python nodes.py HOST:PORT COUNT`: exit code 0 if the Ray there has as many nodes that are alive, else 1."""

import socket
import sys


def count_nodes(address: str) -> int:
    """The nodes of the Ray at `address` (host:port) that are alive; 0 if nothing answers there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()  # Ray itself would try for a minute
    except OSError:
        return 0
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError):  # the head has begun to listen, but is not ready yet
        return 0
    return sum(node["Alive"] for node in ray.nodes())


if __name__ == "__main__":
    sys.exit(count_nodes(sys.argv[1]) < int(sys.argv[2]))
