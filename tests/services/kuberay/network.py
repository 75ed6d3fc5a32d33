"""Hosts that are network namespaces, and a router between them that lets through what it is told.

Nothing of it has a name on this machine: the kernel removes it with the processes that are in it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from tests.services.kuberay.policies import Flow

__all__ = ["Network", "inside"]

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_GATEWAY = "169.254.1.1"  # each host's only neighbour, as with Calico
# As with most networks of Kubernetes, what no policy allows is dropped without an answer.
_RULES = """
table inet pods {
    set cut { type ipv4_addr; }
    set denied { type ipv4_addr . ipv4_addr . inet_service; size 4096; flags dynamic; }
    chain forward {
        type filter hook forward priority filter; policy drop;
        ip saddr @cut drop
        ip daddr @cut drop
        ct state established,related accept
        jump allowed
        tcp flags syn / fin,syn,rst,ack update @denied { ip saddr . ip daddr . tcp dport }
    }
    chain allowed { }
}
"""


class Network:
    """A router, without hosts at first; closed, but for what ``allow`` names."""

    def __init__(self) -> None:
        self._count = 0
        self._router = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_for_namespace(self._router)
            self._run("sysctl", "-qw", "net.ipv4.ip_forward=1")
            self._run("nft", "-f", "-", text=_RULES)
        except BaseException:
            self.remove()
            raise

    def attach(self, pid: int) -> str:
        """Connect the network namespace of a process; its address."""
        self._count += 1
        address, port = f"10.42.0.{self._count}", f"host{self._count}"
        self._run(
            "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid)
        )
        mine = f"link set {port} up\naddr add {_GATEWAY}/32 dev {port}\n"
        self._run("ip", "-batch", "-", text=f"{mine}route add {address}/32 dev {port}\n")
        theirs = f"link set lo up\nlink set eth0 up\naddr add {address}/32 dev eth0\n"
        theirs += f"route add {_GATEWAY} dev eth0 scope link\n"
        theirs += f"route add default via {_GATEWAY} src {address}\n"
        self._run("ip", "-batch", "-", text=theirs, pid=pid)
        return address

    def allow(self, flows: Iterable[Flow]) -> None:
        """Let these connections begin, and no others. Those that there are stay."""
        rules = "".join(f"add rule inet pods allowed {each.rule()} accept\n" for each in flows)
        self._run("nft", "-f", "-", text=f"flush chain inet pods allowed\n{rules}")

    def cut(self, address: str) -> None:
        """Drop all that goes to a host or comes from it, from now on."""
        self._run("nft", "add", "element", "inet", "pods", "cut", f"{{ {address} }}")

    def denied(self, names: Mapping[str, str]) -> list[tuple[str, str, int]]:
        """Connections that were begun and dropped: from, to, port.

        Args:
            names: of the hosts, by their addresses.
        """
        found = json.loads(self._run("nft", "-j", "list", "set", "inet", "pods", "denied"))
        (elements,) = [each["set"].get("elem", []) for each in found["nftables"] if "set" in each]
        tried = [each["elem"]["val"]["concat"] if "elem" in each else each["concat"]
                 for each in elements]  # fmt: skip
        return sorted(
            (names.get(begin, begin), names.get(end, end), port) for begin, end, port in tried
        )

    def remove(self) -> None:
        self._router.kill()
        self._router.wait()

    def _run(self, *command: str, text: str = "", pid: int | None = None) -> str:
        enter = ["nsenter", f"--net=/proc/{pid or self._router.pid}/ns/net"]
        done = subprocess.run(
            [*enter, *command], input=text, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{command} {text}: {done.stderr}"
        return done.stdout


def wait_for_namespace(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process that begins has a network namespace that is not this one's."""
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{process.pid}/ns/net") == own:
        assert process.poll() is None, f"{process.args!r} has ended"
        threading.Event().wait(0.005)


def inside(pid: int, function: Callable[[], T]) -> T:
    """Call a function in the network namespace of a process. Files and names stay this one's."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with Path(f"/proc/{pid}/ns/net").open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            found.append(function())
        except BaseException as error:
            failed.append(error)

    # A namespace is a thread's; this one ends with it.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
