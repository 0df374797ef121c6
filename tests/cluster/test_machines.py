"""The machines on which other tests here run clusters: reached, cut off, reached again, and gone at the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cluster import network

SERVER = (
    "import socket; s = socket.create_server(('', 5000)); print('up', flush=True)\nwhile True: s.accept()[0].close()"
)
CLIENT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=0.3)"


@pytest.mark.skipif(network.why_not() is not None, reason=f"no network of machines here: {network.why_not()}")
def test_a_machine_is_reached_until_it_is_cut_off_and_again_afterwards() -> None:
    with network.Network() as net:
        one, two = net.machine("a"), net.machine("b")
        server = subprocess.Popen(two.command(sys.executable, "-c", SERVER), stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"up\n"

        def reached() -> bool:
            client = one.command(sys.executable, "-c", CLIENT, two.address)
            return subprocess.run(client, stderr=subprocess.DEVNULL).returncode == 0

        assert reached() and two.processes() == [server.pid] and not one.processes()
        two.cut_off()
        assert not reached()
        two.connect()
        while not reached():  # the neighbours ask for its address again
            continue
        two.kill()
        assert not two.processes() and server.wait() < 0
        server.stdout.close()
    there = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert net.name not in there
