"""A real Slurm on this machine: its controller, and two nodes that are both this machine."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.local.ports import free_ports

__all__ = ["NotStarted", "Slurm"]

START_S = 60.0

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=4000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=4000 Gres=gpu:1
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class NotStarted(Exception):
    """Slurm can't be had here; the message says why."""


class Slurm:
    """Slurm's daemons, with munge's, as this user and with files of their own.

    Raises:
        NotStarted: programs are missing, or the nodes are not ready within a minute.
    """

    def __init__(self) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin"
        needed = ("munged", "slurmctld", "slurmd", "sbatch")
        missing = [each for each in needed if shutil.which(each, path=path) is None]
        if missing:
            raise NotStarted(
                f"{', '.join(missing)} not installed (Debian: slurmctld, slurmd, slurm-client, "
                "munge)"
            )
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        (self.folder / "state").mkdir()
        # No GPU, but Slurm counts and hands it out like one.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        configuration = self.folder / "slurm.conf"
        controller, n1, n2 = free_ports(3)
        configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                folder=self.folder,
                controller=controller,
                n1=n1,
                n2=n2,
            )
        )
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(configuration)}
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start_munge()
            for name, *more in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
                self._start(name, "-D", "-f", str(configuration), *more)
            self._wait_for(lambda: self.run("sinfo", "-h", "-o", "%t %D") == "idle 2")
        except BaseException:
            self.stop()
            raise

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        # Forced, as its folder is for this user only.
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._wait_for((self.folder / "munge.socket").exists)

    def _start(self, program: str, *arguments: str) -> None:
        with open(self.folder / "log", "ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [program, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                )
            )

    def _wait_for(self, met: Callable[[], bool]) -> None:
        until = time.monotonic() + START_S
        while not met():
            ended = [each.args for each in self._processes if each.poll() is not None]
            if ended or time.monotonic() > until:
                log = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise NotStarted(f"Slurm does not start, ended is {ended}: {log}")
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints; empty where it fails."""
        found = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return found.stdout.strip() if found.returncode == 0 else ""

    def submit(self, folder: Path, variables: dict[str, str], command: Sequence[str]) -> str:
        """Submit a batch script with sbatch's options before it; the job's id."""
        return subprocess.run(
            ["sbatch", "--parsable", *command],
            cwd=folder,
            env={**self.environment, **variables},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job: ``JobState``, ``ExitCode``, ``Restarts``, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End its jobs, then what was started, the last first, and remove its files."""
        until = time.monotonic() + 30
        # A job's processes outlive the daemons.
        while self.run("squeue", "--noheader") and time.monotonic() < until:
            self.run("scancel", "--user", getpass.getuser())
            time.sleep(0.2)
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)
