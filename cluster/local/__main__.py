"""``python -m cluster.local up|status|down``, from the repository's root.

Standard output has nothing but lines that set variables, for a shell's
``eval "$(python -m cluster.local up)"``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from cluster.local.nodes import start_nodes
from cluster.local.processes import Processes
from cluster.local.prometheus import start_prometheus
from cluster.local.s3 import BUCKET, start_s3
from sbi_dist.errors import InputError, StageError

DEFAULT = Path(f"/tmp/sbi-local-{os.getuid()}")


def say(text: str) -> None:
    print(text, file=sys.stderr)


def tell(processes: Processes) -> None:
    """What users need: the variables on standard output, addresses beside."""
    exports, urls = processes.published()
    for name, url in urls.items():
        say(f"{name:<12}{url}")
    if exports:
        # Which would be taken together with the keys below, or before them.
        print("unset AWS_PROFILE AWS_SESSION_TOKEN")
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(value)}")


def up(processes: Processes, count: int, cpus: int) -> int:
    if processes.exist():
        gone = [name for name, pid in processes.states() if pid is None]
        if gone:
            say(f"started before, but not running: {', '.join(gone)}; `down` ends the rest")
            return 1
        if not processes.published()[0]:
            say("another `up` is at it, or was killed; `down` ends what it started")
            return 1
        say("is up already")
        tell(processes)
        return 0
    began = time.monotonic()
    processes.begin()
    # Neither another server's keys nor another cluster's address.
    for name in [*os.environ]:
        if name.startswith("AWS_") or name == "RAY_ADDRESS":
            del os.environ[name]
    own = dict(os.environ)
    try:
        exports = start_s3(processes, own)
        access, dashboard = start_nodes(processes, {**own, **exports}, count, cpus)
        prometheus = start_prometheus(processes, own)
        urls = {
            "store": f"s3://{BUCKET}",
            "dashboard": f"{dashboard} (asks for the token in {access['RAY_AUTH_TOKEN_PATH']})",
            "prometheus": prometheus or "not installed (Debian: prometheus)",
        }
        processes.publish({**exports, **access}, urls)
    except BaseException:
        remove(processes)
        raise
    say(f"is up after {time.monotonic() - began:.0f} s: {count} nodes with {cpus} CPU(s) each")
    tell(processes)
    if sys.stdout.isatty():
        say('export these variables, or begin with: eval "$(python -m cluster.local up)"')
    return 0


def status(processes: Processes) -> int:
    if not processes.exist():
        say("is not up")
        return 1
    states = processes.states()
    for name, pid in states:
        say(f"{name:<12}{'has ended' if pid is None else f'process {pid}'}")
    tell(processes)
    return 1 if any(pid is None for _, pid in states) else 0


def down(processes: Processes) -> int:
    if not processes.exist():
        say("is not up")
        return 0
    killed = remove(processes)
    say("is down, with all that was in its store")
    if killed:
        say(f"had to be killed: {', '.join(map(str, killed))}")
    return 0


def remove(processes: Processes) -> list[int]:
    killed = processes.end()
    shutil.rmtree(processes.folder)
    return killed


def main() -> int:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=__doc__)
    parser.add_argument("command", choices=("up", "status", "down"))
    parser.add_argument("--nodes", type=int, default=2, help="Ray nodes beside the head (2)")
    parser.add_argument("--cpus", type=int, help="CPUs of each (default: the machine's, shared)")
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT, help=f"where its files are ({DEFAULT})"
    )
    given = parser.parse_args()
    if given.nodes < 1 or (given.cpus is not None and given.cpus < 1):
        parser.error("--nodes and --cpus must be 1 or more")
    try:
        processes = Processes(given.folder)
        if given.command == "up":
            return up(processes, given.nodes, given.cpus or max(1, cores // given.nodes))
        return status(processes) if given.command == "status" else down(processes)
    except (InputError, StageError) as error:
        say(f"cluster.local: {error}")
        return error.exit_code


sys.exit(main())
