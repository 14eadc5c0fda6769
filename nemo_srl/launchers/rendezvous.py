"""How the nodes of one job meet and end together. Every other node has a connection to the first one.

    first node, `Leader`                        another node, `Member`
    listens                                     connects until its deadline, and sends its token and number
    welcomes                                    starts its services
    `ports`: waits until every node is ready    `ready`: sends the ports of its services
    `failure`: checked now and then             `fail`: sends what went wrong
    `close`: the job has ended                  `ended`: checked now and then

Files in the shared log directory would be worse. A file of an earlier start could be taken for one of this start. A
node that ends would not be noticed at once. A network file system may show a new file a minute late.

`torch.distributed.TCPStore` would not make this simpler. It does not tell when a client is gone, so a dead node would
only be noticed by heartbeats of our own, and it asks for no token, so a node of an earlier start could join. It would
also import torch, which takes seconds on every node and which an engine's container need not have.

Messages are JSON objects, one on each line. A connection must first send the token of this start. If it sends anything
else, it is closed. If a node later sends something that is not one of these messages, that is a failure. Raises
`JobFailedError` if nodes do not meet in time, or if one of them ends early. Not covered: IPv6, and encryption.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import select
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_srl.errors import JobFailedError

POLL_SECONDS = 0.25
MAX_LINE = 1 << 20
"""Bytes of a message. The longest one is a failure, which has the end of a log."""
MAX_FAILURE = 1 << 16
"""Characters of a failure that are passed on."""
KEEPALIVE_SECONDS = 30
"""After so much silence, the kernel asks whether a node is still there. A node without power closes no connection."""


@dataclass
class _Peer:
    """A connection to the leader. `node` is None until it has sent the token."""

    connection: socket.socket
    address: str
    buffer: bytes = b""
    node: int | None = None
    joined_at: float = 0.0
    ports: dict[str, int] | None = None
    failure: str | None = None

    @property
    def name(self) -> str:
        return f"node {self.node} of the job ({self.address})"


class Leader:
    """The first node's side, a context manager. `services` holds the names of the services of each other node."""

    def __init__(
        self, *, port: int, token: str, services: Mapping[int, Collection[str]], timeout_seconds: float
    ) -> None:
        self._port, self._token, self._services, self._timeout = port, token, services, timeout_seconds
        self._began = time.monotonic()
        self._peers: list[_Peer] = []
        try:
            self._listener = socket.create_server(("", port), backlog=len(services) + 8)
        except OSError as e:
            raise JobFailedError(
                f"MASTER_PORT={port}: the nodes of this job cannot meet there ({e.strerror}). Run again to go on."
            ) from e
        self._listener.setblocking(False)

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Tell all nodes that the job has ended."""
        self._listener.close()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.connection.sendall(_line({"end": True}))
            peer.connection.close()
        self._peers = []

    def ports(self, meanwhile: Callable[[], None]) -> dict[int, tuple[str, dict[str, int]]]:
        """Wait until every node is ready. Returns the address of each, and the ports of its services.

        Calls `meanwhile` now and then, which may raise.
        """
        while True:
            self.check()
            meanwhile()
            joined = {p.node: p for p in self._peers if p.node is not None}
            ready = {node: (p.address, p.ports) for node, p in joined.items() if p.ports is not None}
            if ready.keys() == self._services.keys():
                return ready
            for node in self._services.keys() - ready.keys():
                self._check_time(node, joined.get(node))
            time.sleep(POLL_SECONDS)

    def failure(self) -> str | None:
        """What went wrong on another node, or that the node is gone. None if all is well."""
        self._poll()
        for p in self._peers:
            if p.node is not None and p.failure is not None:
                return f"{p.name} {p.failure}"
        return None

    def check(self) -> None:
        """Raise `JobFailedError` if there is a failure."""
        if found := self.failure():
            raise JobFailedError(found)

    def _check_time(self, node: int, peer: _Peer | None) -> None:
        now, limit = time.monotonic(), f"{self._timeout:g} s (start_timeout_seconds)"
        if peer is None and now - self._began > self._timeout:
            raise JobFailedError(
                f"node {node} of the job did not join in {limit}. Its task did not start, or it cannot reach port "
                f"{self._port} of the first node {socket.gethostname()}: there may be a firewall between the nodes, or "
                "the name does not resolve there."
            )
        # A node checks the deadline of its services itself, and sends which of them missed it. It needs time for that.
        if peer is not None and now - peer.joined_at > self._timeout + KEEPALIVE_SECONDS:
            raise JobFailedError(f"{peer.name} was not ready after {limit}, and did not say why")

    def _poll(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, (address, _) = self._listener.accept()
                connection.setblocking(False)
                _keep_alive(connection)
                self._peers.append(_Peer(connection, address))
        for peer in list(self._peers):
            self._read(peer)

    def _read(self, peer: _Peer) -> None:
        closed = False
        try:
            while len(peer.buffer) <= MAX_LINE and (block := peer.connection.recv(1 << 16)):
                peer.buffer += block
            closed = True  # by the other side, or because the message is too long
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *lines, peer.buffer = peer.buffer.split(b"\n")
        understood = all(self._take(peer, line) for line in lines)
        if peer.node is None and (closed or not understood):
            self._peers.remove(peer)
            peer.connection.close()
            if lines:
                print(f"warning: a connection from {peer.address} is not of this start of the job", file=sys.stderr)
        elif closed and peer.failure is None:
            peer.failure = "is gone: its process or the node itself ended without a message"
        elif not understood:
            peer.failure = "sent an unexpected message"

    def _take(self, peer: _Peer, line: bytes) -> bool:
        """Take a message. Returns whether it may come here."""
        try:
            message: Any = json.loads(line)
        except ValueError:
            return False
        match message:
            case {"token": str(token), "node": int(node)} if peer.node is None:
                known = hmac.compare_digest(token.encode(), self._token.encode())
                if not known or node not in self._services or node in {p.node for p in self._peers}:
                    return False
                peer.node, peer.joined_at = node, time.monotonic()
                with contextlib.suppress(OSError):
                    peer.connection.sendall(_line({"welcome": True}))
                return True
            case {"ready": dict(ports)} if peer.node is not None and ports.keys() == set(self._services[peer.node]):
                peer.ports = {str(name): int(port) for name, port in ports.items()}
                return True
            case {"failure": str(text)} if peer.node is not None:
                peer.failure = f"failed: {text}"
                return True
        return False


class Member:
    """Another node's side, a context manager. Making one waits for the leader's welcome."""

    def __init__(self, address: str, *, port: int, token: str, node: int, timeout_seconds: float) -> None:
        self._buffer = b""
        deadline = time.monotonic() + timeout_seconds
        while True:
            problem = self._join(address, port, {"token": token, "node": node}, deadline)
            if problem is None:
                return
            if time.monotonic() > deadline:
                raise JobFailedError(
                    f"node {node} of the job ({socket.gethostname()}) could not join the first one, {address}:{port}, "
                    f"in {timeout_seconds:g} s (start_timeout_seconds): {problem}"
                )
            time.sleep(POLL_SECONDS)

    def _join(self, address: str, port: int, hello: Mapping[str, Any], deadline: float) -> str | None:
        """Try once. Returns None, or why it failed. At first the port may still belong to an earlier step that ends."""
        try:
            self._connection = socket.create_connection((address, port), timeout=5)
        except OSError as e:
            return str(e)
        try:
            self._connection.sendall(_line(hello))
            self._connection.settimeout(max(1.0, deadline - time.monotonic()))
            welcome = self._connection.recv(1 << 16)
        except OSError as e:
            welcome, problem = b"", str(e)
        else:
            problem = "it closed the connection (the first node of another start?)"
        if not welcome:
            self._connection.close()
            return problem
        self._buffer = welcome.partition(b"\n")[2]
        _keep_alive(self._connection)
        return None

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *args: object) -> None:
        self._connection.close()

    @property
    def host(self) -> str:
        """The address of this node at which the first one can reach it."""
        return str(self._connection.getsockname()[0])

    def ready(self, ports: Mapping[str, int]) -> None:
        """All services of this node are healthy."""
        with contextlib.suppress(OSError):  # if the leader is gone, `ended` raises an error that explains it
            self._connection.sendall(_line({"ready": dict(ports)}))

    def fail(self, message: str) -> bool:
        """Send what went wrong here. Returns whether the leader ended the job after that."""
        with contextlib.suppress(OSError):
            self._connection.sendall(_line({"failure": message[-MAX_FAILURE:]}))
        deadline = time.monotonic() + 2 * KEEPALIVE_SECONDS
        while time.monotonic() < deadline:
            try:
                if self.ended():
                    return True
            except JobFailedError:
                break
        return False

    def ended(self, seconds: float = POLL_SECONDS) -> bool:
        """Wait a moment, and return whether the job has ended. Raises `JobFailedError` if the first node is gone."""
        if select.select([self._connection], [], [], seconds)[0]:
            try:
                block = self._connection.recv(1 << 16)
            except OSError:
                block = b""
            self._buffer += block
            if not block and b"\n" not in self._buffer:
                raise JobFailedError("the first node of the job is gone: its process ended without a message")
        return b"\n" in self._buffer  # the leader sends only one message after its welcome

    def check(self) -> None:
        """Raise `JobFailedError` if the job has ended, which is too early now."""
        if self.ended(0):
            raise JobFailedError("the job ended on its first node while the services of this one were starting")


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", KEEPALIVE_SECONDS), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if option := getattr(socket, name, None):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
