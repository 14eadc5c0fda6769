"""Ports that stay free until they are used."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port below the ephemeral ones, as on a cluster. At an ephemeral port, a connection could connect to itself.

    And any other connection could take it before the test does.
    """
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
