"""Ports of this machine that nothing listens on."""

from __future__ import annotations

import random
import socket

__all__ = ["free_ports"]


def free_ports(count: int, also_above: int = 0) -> list[int]:
    """Free ports of the loopback, below those that the kernel gives out to connections.

    Args:
        count: how many.
        also_above: the ports so far above them are free, too.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(12_000, 20_000)
        if port not in found and _is_free(port) and _is_free(port + also_above):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
