"""Training from and to a real S3 server: workers, drivers and the server itself are killed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from sbi_dist.session import connected
from sbi_dist.store import LocalStore, S3Store
from tests.ray.faults import Disturbed, fit_in, weights_of
from tests.services.s3_server import S3Server


def test_faults_are_not_seen_in_the_weights(
    tmp_path: Path, s3_server: S3Server, store: S3Store
) -> None:
    """Bit for bit those of an undisturbed training in one process and on a local disk."""
    calm = LocalStore(tmp_path)
    with connected():
        fit_in(calm, workers=0)
    # Its Ray gets this process's environment, with the credentials.
    disturbed = Disturbed(store, None, seed=2, workers=1)
    disturbed.wait_for_progress()
    disturbed.kill_workers()
    disturbed.wait_for_progress()
    s3_server.kill()
    time.sleep(2.0)
    assert disturbed.process.poll() is None, "it was to wait for the server"
    s3_server.restart()
    disturbed.wait_for_progress()
    disturbed.kill()
    disturbed.finish()
    assert weights_of(store) == weights_of(calm)
    history, other = (json.loads(each.get("model/metrics.json")) for each in (store, calm))
    assert history["validation_loss"] == other["validation_loss"]
    assert not list(store.list("model/checkpoints/"))
