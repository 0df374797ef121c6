"""Machines of a test: network namespaces on one bridge, each with an address of its own, whose cable can be pulled."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType


def why_not() -> str | None:
    """Why no network can be made here; None if it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "there is no ip (iproute2)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"rds-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "bridge", "type", "bridge")
            _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two")
        finally:
            _ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"the kernel makes no network: {error.stderr.strip()}"
    return None


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Machine:
    """A network namespace with an address, and the processes in it."""

    def __init__(self, hub: str, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._hub, self._space = hub, f"{hub}-{name}"
        _ip("netns", "add", self._space)
        # Both ends of the cable are in namespaces from the beginning: the machine of the tests keeps its own network.
        _ip("-n", hub, "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", self._space)
        _ip("-n", hub, "link", "set", "dev", name, "master", "bridge", "up")
        _ip("-n", self._space, "link", "set", "lo", "up")
        _ip("-n", self._space, "link", "set", "eth0", "up")
        _ip("-n", self._space, "address", "add", f"{address}/24", "dev", "eth0")
        # Ray asks which address it would send from.
        _ip("-n", self._space, "route", "add", "default", "via", GATEWAY)

    def command(self, *command: str) -> list[str]:
        """The command, to be run on this machine."""
        return ["ip", "netns", "exec", self._space, *command]

    def cut_off(self) -> None:
        """Nothing that is sent arrives, and nobody is told so."""
        _ip("-n", self._hub, "link", "set", "dev", self.name, "down")

    def connect(self) -> None:
        """The end of `cut_off`."""
        _ip("-n", self._hub, "link", "set", "dev", self.name, "up")

    def processes(self) -> list[int]:
        """Ids of what runs on this machine."""
        return [int(pid) for pid in _ip("netns", "pids", self._space).split()]

    def find(self, text: str) -> list[int]:
        """Ids of the processes whose command line begins with Python and holds `text`."""
        found = []
        for pid in self.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if b"python" in os.path.basename(words[0]) and any(text.encode() == word for word in words):
                found.append(pid)
        return found

    def kill(self) -> None:
        """SIGKILL for everything on it, as when the power is gone."""
        while pids := self.processes():  # one that is killed may just have started another
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def remove(self) -> None:
        """End everything on it, and take it away."""
        self.kill()
        _ip("netns", "del", self._space)  # the cable goes with it


GATEWAY = "10.77.0.1"


class Network:
    """A bridge in a namespace of its own, and the machines on it; all of it is gone at the end."""

    def __init__(self) -> None:
        self.name = f"rds-{secrets.token_hex(3)}"
        """How the names of all its namespaces begin."""
        self._machines: dict[str, Machine] = {}

    def __enter__(self) -> Network:
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.name, "link", "set", "bridge", "up")
        _ip("-n", self.name, "address", "add", f"{GATEWAY}/24", "dev", "bridge")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self._machines.values():
            machine.remove()
        _ip("netns", "del", self.name)

    def machine(self, name: str) -> Machine:
        """A new machine; its address is the next one."""
        self._machines[name] = made = Machine(self.name, name, f"10.77.0.{len(self._machines) + 2}")
        return made
