"""Ray's command, for machines that others load too: by itself it gives a node thirty seconds to start, and then fails.

`python -m tests.cluster.patience start …` is `ray start …`.
"""

from __future__ import annotations

import os
import time
from typing import Any

from ray._private import services

MINUTES = 5.0
ENVIRONMENT = {"RAY_worker_register_timeout_seconds": "300"}
"""Of what such a node starts."""


def be_patient() -> None:
    """From now on a node that this process starts has some minutes."""
    find = services.get_node

    def found(*arguments: Any) -> Any:
        end = time.monotonic() + 60 * MINUTES
        while True:
            try:
                return find(*arguments)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    services.get_node = found


if __name__ == "__main__":
    from ray.scripts.scripts import main

    os.environ.update(ENVIRONMENT)
    be_patient()
    main()
