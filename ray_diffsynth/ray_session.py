"""Joining or starting Ray: the one place where a job decides which cluster it runs on."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.annotations import RayDeprecationWarning

from ray_diffsynth.errors import UserError


class ClusterError(UserError):
    """The Ray cluster cannot be joined, or lacks what was asked for."""


@contextmanager
def ray_session(address: str | None = None, *, verbose: bool = False) -> Iterator[None]:
    """Within it Ray is up: the one already joined, else `address` or RAY_ADDRESS, else a local one that ends with the block.

    Workers compute with one thread per reserved CPU (OMP_NUM_THREADS is Ray's default), so that pools do not fight over cores.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    # Ray 2.60 warns about a change of default; unset, CPU-only actors would still see every GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not verbose:
        # Ray Data has no other way yet to bound an actor's restarts than the arguments that 2.60 deprecates.
        warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    options = {"include_dashboard": False} if address == "local" else {}
    level = logging.INFO if verbose else logging.ERROR
    try:
        ray.init(address=address, log_to_driver=verbose, logging_level=level, **options)
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}; start one, or leave --ray_address out for a local one") from error
    logging.getLogger("ray.data").setLevel(level)
    logging.getLogger("ray.train").setLevel(level)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_devices() -> tuple[float, float]:
    """(CPUs, GPUs) of the whole cluster."""
    total = ray.cluster_resources()
    return total.get("CPU", 0.0), total.get("GPU", 0.0)
