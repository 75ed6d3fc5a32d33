"""Nodes that the autoscaler of a Ray cluster may add: asked for, and waited for.

Which kinds of nodes there may be is the autoscaler's own knowledge, of which the cluster gets to
know little. So it is asked by a demand, a placement group that nothing runs in, and answers by
starting nodes or by calling the demand infeasible.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from sbi_dist.errors import StageError
from sbi_dist.progress import duration, say

__all__ = ["PATIENCE_S", "fitting", "grow", "tells"]

PATIENCE_S = 1800.0  # machines of a cloud, with a large image to pull, take minutes
_LOOK_EVERY_S = 0.5
_SAY_EVERY_S = 30.0
# An autoscaler looks at demands every 5 s by default; one that is silent for so long is not there.
_SILENT_S = 60.0
# Nodes that are about to end may count against the most that there may be: so look twice.
_REFUSALS = 2


def fitting(node: dict[str, float], resources: dict[str, float]) -> int:
    """How many processes with these resources a node with those can hold, were it empty."""
    wanted = _wanted(resources)
    return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())


def _wanted(resources: dict[str, float]) -> dict[str, float]:
    # One without any resources fits where there is a CPU.
    return {name: amount for name, amount in resources.items() if amount} or {"CPU": 1.0}


def tells() -> bool:
    """Whether the cluster has an autoscaler that can be asked; one of version 1 can't."""
    return _tables() is not None


def grow(
    resources: dict[str, float],
    count: int,
    label: str,
    room: Callable[[], int],
    patience_s: float = PATIENCE_S,
) -> str:
    """Have the autoscaler add nodes until there is room for ``count`` processes; why there is none.

    Returns at once where the cluster has no autoscaler, and within seconds where none of its nodes
    would do. An interrupt takes the demand back.

    Args:
        resources: of a process, by Ray's names; memory in bytes.
        count: how many processes.
        label: what the lines to the user begin with.
        room: for how many there is room now.
        patience_s: how long nodes may take to start.

    Returns:
        What the autoscaler may add that is not enough, or that it adds nothing; empty where there
        is room now.

    Raises:
        StageError: the nodes did not start in time.
    """
    import ray

    tables = _tables()
    if tables is None:
        return "it has no autoscaler, of version 2, that adds nodes"
    groups = _groups()
    if groups and room() + sum(_most(group, resources) for group in groups) < count:
        return f"its autoscaler may add {'; '.join(map(_described, groups))}"
    wanted = _wanted(resources)
    group = ray.util.placement_group([wanted] * count)
    try:
        return _wait(tables, group.id.hex(), wanted, count, label, room, patience_s)
    finally:
        ray.util.remove_placement_group(group)


def _wait(
    tables: Any,
    demand: str,
    wanted: dict[str, float],
    count: int,
    label: str,
    room: Callable[[], int],
    patience_s: float,
) -> str:
    each = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    began = answered = time.monotonic()
    said = -math.inf
    version, looks, refusals = -1, 0, 0
    while room() < count:
        now = time.monotonic()
        state = _state(tables)
        if state is not None and state.last_seen_cluster_resource_state_version != version:
            version, answered = state.last_seen_cluster_resource_state_version, now
            refused = any(
                demand in each.details for each in state.infeasible_gang_resource_requests
            )
            refusals = refusals + 1 if refused else 0
            looks += 1
            if refusals >= _REFUSALS:
                return "its autoscaler has no nodes to add that these would fit on"
        if now - answered > _SILENT_S:
            return f"its autoscaler has not answered for {_SILENT_S:g} s"
        if now - began > patience_s:
            failed = _failures(state)
            raise StageError(
                f"{label}: the nodes for {count} x ({each}) did not start within "
                f"{duration(patience_s)}{f' ({failed})' if failed else ''}; `ray status` and the "
                "autoscaler's log tell more; run the command again when they can"
            )
        # Not before the autoscaler has said what it does.
        if looks >= _REFUSALS and not refusals and now - said >= _SAY_EVERY_S:
            said = now
            notes = [_coming(state), _failures(state), f"since {duration(now - began)}"]
            say(
                f"{label}: waiting for nodes with room for {count} x ({each}) to start; "
                + ", ".join(note for note in notes if note)
            )
        time.sleep(_LOOK_EVERY_S)
    say(f"{label}: the nodes started within {duration(time.monotonic() - began)}")
    return ""


def _tables() -> Any:
    """The client of the cluster's tables, if there is an autoscaler that answers by them."""
    import ray
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if ray.util.client.ray.is_connected():
        return None  # the tables are out of reach
    tables = global_worker.gcs_client
    return tables if is_autoscaler_v2(True, tables) else None


def _state(tables: Any) -> Any:
    """What the autoscaler has last reported of itself; None where the tables do not answer."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    try:
        text = tables.get_cluster_status(timeout_s=10)
    except Exception:  # the head is restarted, say; it is asked again
        return None
    return GetClusterStatusReply.FromString(text).autoscaling_state


def _coming(state: Any) -> str:
    kinds: Counter[str] = Counter()
    for each in state.pending_instance_requests if state else ():
        kinds[f"{each.ray_node_type_name} asked for"] += each.count
    for each in state.pending_instances if state else ():
        kinds[f"{each.ray_node_type_name} starting"] += 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _failures(state: Any) -> str:
    failed = list(state.failed_instance_requests) if state else []
    if not failed:
        return ""
    last = max(failed, key=lambda each: each.failed_ts)
    return f"{last.ray_node_type_name} could not be had: {last.reason[:200]}"


@dataclasses.dataclass(frozen=True)
class _Group:
    """A kind of nodes, and how many of them there may be."""

    name: str
    resources: dict[str, float]
    most: float


def _groups() -> list[_Group]:
    """What the autoscaler may add; empty where Ray's version does not tell."""
    from ray._private.state import state

    config = state.get_cluster_config()
    return [
        _Group(each.name, dict(each.resources), math.inf if each.max_count < 0 else each.max_count)
        for each in (config.node_group_configs if config else ())
        if each.resources and each.max_count
    ]


def _most(group: _Group, resources: dict[str, float]) -> float:
    each = fitting(group.resources, resources)
    return each and each * group.most


def _described(group: _Group) -> str:
    units = {"CPU": (1.0, "CPU"), "GPU": (1.0, "GPU"), "memory": (1e9, "GB of memory")}
    amounts = ", ".join(
        f"{group.resources[name] / scale:g} {unit}"
        for name, (scale, unit) in units.items()
        if group.resources.get(name)
    )
    number = "any number of" if group.most == math.inf else f"up to {group.most:g}"
    return f"{number} {group.name or 'nodes'} ({amounts})"
