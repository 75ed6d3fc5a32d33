"""Network policies, as the connections that they let pods begin.

Of Kubernetes' documentation of NetworkPolicy: a pod that any policy selects for a direction is
closed in it but for what the policies that select it allow; both ends have to allow a connection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Flow", "Peer", "flows"]

Policy = dict[str, Any]
Ports = tuple[str, int, int]  # protocol, first, last
_ALL: list[Ports] = [("tcp", 0, 65535), ("udp", 0, 65535)]


@dataclass(frozen=True)
class Peer:
    """A pod, to policies."""

    address: str
    namespace: str
    labels: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True)
class Flow:
    """Connections from one address to ports of another."""

    source: str
    target: str
    protocol: str
    first: int
    last: int

    def rule(self) -> str:
        """The condition of a rule of nftables."""
        ports = f"{self.protocol} dport {self.first}-{self.last}"
        return f"ip saddr {self.source} ip daddr {self.target} {ports}"


def flows(policies: Sequence[Policy], peers: Sequence[Peer]) -> set[Flow]:
    """What may begin between pods. Namespaces have no label but their name's."""
    return {
        Flow(source.address, target.address, protocol, max(a, c), min(b, d))
        for source in peers
        for target in peers
        if source != target
        for protocol, a, b in _allowed(policies, "egress", source, target)
        for other, c, d in _allowed(policies, "ingress", target, source)
        if protocol == other and max(a, c) <= min(b, d)
    }


def _allowed(policies: Sequence[Policy], direction: str, of: Peer, other: Peer) -> Iterator[Ports]:
    closed = False
    for policy in policies:
        spec = policy["spec"]
        if (
            policy["metadata"]["namespace"] != of.namespace
            or direction.capitalize() not in spec["policyTypes"]
            or not _selects(spec["podSelector"], of.labels)
        ):
            continue
        closed = True
        for rule in spec.get(direction) or ():
            ends = rule.get("from" if direction == "ingress" else "to")
            if not ends or any(_is(each, other, of.namespace) for each in ends):
                yield from map(_ports, rule["ports"]) if rule.get("ports") else _ALL
    if not closed:
        yield from _ALL


def _is(end: dict[str, Any], peer: Peer, namespace: str) -> bool:
    if "ipBlock" in end:
        address, block = ipaddress.ip_address(peer.address), end["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(each) for each in block.get("except") or ()
        )
    if "namespaceSelector" in end:
        name = {"kubernetes.io/metadata.name": peer.namespace}
        if not _selects(end["namespaceSelector"], name):
            return False
    elif peer.namespace != namespace:
        return False
    return _selects(end.get("podSelector") or {}, peer.labels)


def _selects(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions") or ():
        assert each["operator"] == "In", each
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def _ports(port: dict[str, Any]) -> Ports:
    return port.get("protocol", "TCP").lower(), port["port"], port.get("endPort", port["port"])
