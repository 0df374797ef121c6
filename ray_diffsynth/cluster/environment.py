"""Variables of the job's environment in all its processes, set before these import torch or a hub's library.

A worker inherits the environment of the machine's `ray start`, not the job's. Values go from process to process only:
not into arguments of actors and runtime environments, which Ray keeps in its tables and shows in its dashboard.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.cloudpickle

from ray_diffsynth.errors import ConfigError

PREFIXES = (
    *("AWS_", "DIFFSYNTH_", "DIFFUSERS_", "FI_", "GOOGLE_", "HF_"),
    *("MLFLOW_", "NCCL_", "PYTORCH_", "TORCH_", "WANDB_"),
)
"""Beginnings of the names of variables that all processes of a job get."""
_received: dict[str, str] = {}
"""What this process has set, as opposed to what was its own."""
_environments: set[str] = set()
"""Those that this process has."""


def forwarded(names: Sequence[str]) -> dict[str, str]:
    """The variables of this process that the workers get: by PREFIXES, and those of `names`.

    Raises ConfigError for a name that is not set here.
    """
    for name in names:
        if name not in os.environ:
            raise ConfigError(
                f"env: {name} is not set where the job runs, so its processes would not get it; export it there, or "
                "leave it out"
            )
    return {name: value for name, value in os.environ.items() if name in names or name.startswith(PREFIXES)}


def receive(values: Mapping[str, str]) -> None:
    """Set the variables that this process does not have by itself."""
    for name, value in values.items():
        if os.environ.get(name) == _received.get(name):
            os.environ[name] = _received[name] = value


@dataclass(frozen=True)
class Environment:
    """Where processes get the job's variables from. holder: handle of an actor beside the driver."""

    holder: Any
    name: str

    def apply(self) -> None:
        """Set the variables in this process, once."""
        if self.name not in _environments:
            receive(ray.get(self.holder.get.remote()))
            _environments.add(self.name)


@ray.remote(num_cpus=0)
class _Holder:
    """Has the values in its memory: given by a call, since Ray keeps the arguments that an actor is made with."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, values: dict[str, str]) -> None:
        self._values = values

    def get(self) -> dict[str, str]:
        return self._values


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[Environment | None]:
    """What gives the values to the processes of this job while the block runs; None without any."""
    if not values:
        yield None
        return
    from ray_diffsynth.cluster.joined import on_this_node  # not in each process that unpacks a parcel

    holder = _Holder.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    ray.get(holder.set.remote(dict(values)))
    try:
        yield Environment(holder, uuid.uuid4().hex)
    finally:
        ray.kill(holder)


class Shipped:
    """An object for tasks, whose processes set the variables before they import the modules that it needs.

    environment: an attribute of each; None where the processes have the variables by themselves.
    """

    environment: Environment | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.environment, ray.cloudpickle.dumps((type(self), vars(self))))


def _unpack(where: Environment | None, content: bytes) -> Any:
    if where is not None:
        where.apply()
    kind, state = ray.cloudpickle.loads(content)
    made = object.__new__(kind)
    vars(made).update(state)
    return made


class Parcel:
    """Any value for another process, in which the variables are set before it is unpacked: by the first use of `value`.

    Who only passes it on imports nothing that it needs.
    """

    def __init__(self, environment: Environment | None, value: Any) -> None:
        self._environment = environment
        self._value = value
        self._content: bytes | None = None

    @property
    def value(self) -> Any:
        """What was packed."""
        if self._content is not None:
            if self._environment is not None:
                self._environment.apply()
            self._value, self._content = ray.cloudpickle.loads(self._content), None
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        content = ray.cloudpickle.dumps(self._value) if self._content is None else self._content
        return {"_environment": self._environment, "_value": None, "_content": content}


def call(parcel: Parcel, *arguments: Any) -> Any:
    """What a task runs: the function in the parcel."""
    return parcel.value(*arguments)


class CallableActor:
    """For an actor pool of Ray Data: calls what the function in the parcel returns, with each row."""

    def __init__(self, parcel: Parcel) -> None:
        self._inner = parcel.value()

    def __call__(self, row: Any) -> Any:
        return self._inner(row)
