"""How much memory there is for simulations."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]

_MEMINFO, _GROUPS, _CONTROL = "proc/meminfo", "proc/self/cgroup", "sys/fs/cgroup"


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: what the machine has, or what its cgroups allow.

    Args:
        root: what /proc and /sys are under.

    Returns:
        None where the system does not tell.
    """
    found = []
    for line in _lines(root / _MEMINFO):
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for line in _lines(root / _GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _left(root / _CONTROL, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            found += _left(
                root / _CONTROL / "memory",
                path,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
    return max(0, min(found)) if found else None


def _left(base: Path, path: str, limit: str, usage: str, cached: str) -> list[int]:
    """What a group and those around it have left."""
    found = []
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:depth])
        most, used = "".join(_lines(folder / limit)), "".join(_lines(folder / usage))
        if most.isdigit() and used.isdigit():
            # Pages of files that were read are given back when memory is needed.
            pages = [line.split() for line in _lines(folder / "memory.stat")]
            free = sum(int(value) for name, value in pages if name == cached)
            found.append(int(most) - int(used) + free)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
