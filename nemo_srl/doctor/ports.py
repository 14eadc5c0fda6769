"""Whether the nodes of a job reach each other's ports: MASTER_PORT, those of servers, and free ones (NCCL's)."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_srl.doctor.findings import Finding, not_checked
from nemo_srl.doctor.probe import Node, put, read_text

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site

SERVERS = range(8100, 9000)
"""`launchers/services.py` takes ports of this range for servers."""
NUM_PORTS = 3
"""Of each kind that has several."""
TIMEOUT_SECONDS = 5.0
GREETING = b"nemo_srl doctor"


def probe(node: Node) -> dict[str, Any]:
    """Listen on some ports, tell the others which, and connect to theirs."""
    if node.count == 1:
        return {"tried": []}
    with Listeners(_wanted(node.index)) as listening:
        put(node.file("ports"), json.dumps({"host": _own_address(node.index), "ports": listening.ports}))
        tried = [row for other in range(node.count) if other != node.index for row in _reach(node, other)]
        put(node.file("reached"), "1")
        node.until(lambda: all(node.file("reached", i).exists() for i in range(node.count)))
    return {"tried": tried}


class Listeners:
    """Sockets that greet whoever connects. A context manager. `ports` holds the numbers, by kind."""

    def __init__(self, wanted: Sequence[tuple[str, int]]) -> None:
        self._sockets: list[socket.socket] = []
        self.ports: list[tuple[str, int]] = []
        for kind, port in wanted:
            try:
                listener = socket.create_server(("", port))
            except OSError:
                continue  # another program has it
            self._sockets.append(listener)
            self.ports.append((kind, listener.getsockname()[1]))

    def __enter__(self) -> Listeners:
        for listener in self._sockets:
            threading.Thread(target=self._greet, args=(listener,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        for listener in self._sockets:
            listener.close()

    @staticmethod
    def _greet(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(GREETING)
            except OSError:
                return


def judge(site: Site, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """One finding for all pairs of nodes."""
    tried = "connections between all nodes of the job"
    if len(nodes) == 1:
        yield not_checked("ports", "the recipe's jobs have one node", tried=tried)
        return
    rows = [row for facts in nodes for row in facts["ports"].get("tried", ())]
    problems = [f"{f['host']}: {f['ports']['error']}" for f in nodes if "error" in f["ports"]]
    problems += [f"{r['from']} -> {r['to']}:{r['port']} ({r['kind']}): {r['problem']}" for r in rows if r["problem"]]
    reached = len(rows) - sum(bool(r["problem"]) for r in rows)
    text = f"{reached} of {len(rows)} connections" + (f"; {'; '.join(problems)}" if problems else "")
    remedy = (
        "Nodes must resolve MASTER_ADDR, the name of the first one. They must reach each other's MASTER_PORT (20000 to "
        "29999), the ports of servers (8100 to 8999) and free ports (/proc/sys/net/ipv4/ip_local_port_range). Open "
        "them in the nodes' firewall. If names lead to the wrong network, set cluster.env.NCCL_SOCKET_IFNAME and "
        "GLOO_SOCKET_IFNAME to the right interface."
    )
    ok = not problems and bool(rows)
    yield Finding(name="ports", ok=ok, text=text, tried=tried, remedy="" if ok else remedy)


def _wanted(index: int) -> list[tuple[str, int]]:
    """The kinds and numbers of ports to listen on. 0 stands for a free one."""
    master = os.environ.get("MASTER_PORT")
    wanted = [("MASTER_PORT", int(master))] if index == 0 and master else []
    wanted += [("server", port) for port in random.sample(SERVERS, NUM_PORTS)]
    return [*wanted, *[("free", 0)] * NUM_PORTS]


def _own_address(index: int) -> str:
    """How others reach this node: the first one by MASTER_ADDR, and others by their address towards it."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if index == 0:
        return master
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((master, 9))  # sends nothing, and chooses the interface
        return str(s.getsockname()[0])


def _reach(node: Node, other: int) -> list[dict[str, Any]]:
    """Connect to all ports of another node."""
    path = node.file("ports", other)
    if not node.wait_for(path) or (text := read_text(path)) is None:
        return [_row(f"node {other}", "any", 0, "it did not say where it listens, or its file is not visible")]
    told = json.loads(text)
    return [_row(told["host"], kind, port, _connect(told["host"], port)) for kind, port in told["ports"]]


def _row(host: str, kind: str, port: int, problem: str) -> dict[str, Any]:
    return {"from": socket.gethostname(), "to": host, "kind": kind, "port": port, "problem": problem}


def _connect(host: str, port: int) -> str:
    """What went wrong. Empty if nothing."""
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_SECONDS) as connection:
            connection.settimeout(TIMEOUT_SECONDS)
            return "" if connection.recv(len(GREETING), socket.MSG_WAITALL) == GREETING else "another program answered"
    except OSError as e:
        return str(e) or type(e).__name__
