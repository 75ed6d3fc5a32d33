"""The options of the ``serve`` stage."""

from __future__ import annotations

import dataclasses

from sbi_dist.errors import InputError
from sbi_dist.options import Options, option, resources

__all__ = ["ServeOptions"]


@dataclasses.dataclass(frozen=True)
class ServeOptions(Options):
    """Where the service listens, what it takes, and what it may use."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all of the machine's")
    port: int = option(8000, "port to listen on", ge=1, le=65535)
    proxy: str = option(
        "haproxy",
        "what stands before the replicas: haproxy, or Ray's own proxy (ray), which is slower",
        choices=("haproxy", "ray"),
    )
    min_replicas: int = option(1, "replicas at least", ge=1, le=10_000)
    max_replicas: int | None = option(
        None, "replicas at most, by what waits; default: as many as at least", ge=1, le=10_000
    )
    target_wait_s: float = option(
        0.5, "expected wait from which on another replica is started", gt=0, le=3600
    )
    cpus_per_replica: float = option(1, "CPUs of a replica, and its threads", ge=0)
    gpus_per_replica: float = option(0, "GPUs of a replica", ge=0)
    models_memory_mb: float = option(
        1024, "memory for models of a replica; the one used longest ago makes room", gt=0
    )
    largest_model_mb: float = option(512, "weights of a model at most", gt=0)
    refresh_s: float = option(2.0, "how often to look for a newly promoted model", ge=0.05, le=3600)
    timeout_s: float = option(60.0, "time for a request that names no X-Timeout-S", gt=0, le=86_400)
    max_timeout_s: float = option(600.0, "time that a request may ask for", gt=0, le=86_400)
    max_wait_s: float = option(
        2.0,
        "expected wait from which on requests are turned away (503); a large one may wait for four "
        "times what it takes itself",
        gt=0,
        le=3600,
    )
    max_requests: int = option(512, "requests at once, of a replica", ge=1, le=100_000)
    max_observations: int = option(100_000, "observations of a request", ge=1)
    max_draws: int = option(1_000_000, "draws of an observation", ge=1, le=100_000_000)
    max_total_draws: int = option(1_000_000_000, "draws of a request", ge=1)
    max_body_mb: float = option(64.0, "body of a request", gt=0, le=4096)
    request_memory_mb: float = option(
        1024, "memory for the bodies and answers of all requests of a replica", gt=0
    )
    tokens_file: str | None = option(
        None,
        "file of bearer tokens, one a line, read again when it changes; default: no tokens are "
        "asked for",
    )
    drain_s: float = option(
        30.0, "how long a replica that is to end may take for requests that it has", ge=0, le=3600
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise InputError(
                f"max_replicas is {self.max_replicas}; it must be at least min_replicas, "
                f"{self.min_replicas}"
            )
        if self.timeout_s > self.max_timeout_s:
            raise InputError(
                f"timeout_s is {self.timeout_s:g}; it must be at most max_timeout_s, "
                f"{self.max_timeout_s:g}"
            )
        if not self.host:
            raise InputError("host is empty; give an address, as 127.0.0.1 or 0.0.0.0")

    def resources(self) -> dict[str, float]:
        """What one replica takes, by Ray's names."""
        return resources(self.cpus_per_replica, self.gpus_per_replica)
