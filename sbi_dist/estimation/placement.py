"""What a training asks of a Ray cluster: how many workers, and what each of them takes."""

from __future__ import annotations

import dataclasses

import torch

from sbi_dist.errors import InputError
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.session import capacity, is_own, require

__all__ = ["Placement", "place"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Workers of a job (0: this process), the fewest it goes on with, and what each one takes."""

    workers: int
    least: int
    resources: dict[str, float]

    def members(self, count: int) -> int:
        """How many of ``count`` jobs to run side by side."""
        if self.workers == 0:
            return 1
        return min(count, capacity(self.resources) // self.workers)


def place(options: TrainOptions) -> Placement:
    """What a training asks for, of what is there.

    Raises:
        InputError: the cluster can never hold it.
    """
    import ray

    there = ray.cluster_resources()
    gpus = options.gpus_per_worker
    workers = options.workers
    if isinstance(workers, str):
        workers = int(there.get("GPU", 0.0) // (gpus or 1.0)) if gpus != 0 else 0
        # On a Ray of this process's own there is nothing to gain from another process.
        workers = workers or (0 if is_own() and options.min_workers is None else 1)
    if gpus is None:
        gpus = 1.0 if 0 < workers <= there.get("GPU", 0.0) else 0.0
    cpus = options.cpus_per_worker
    if cpus is None:
        # The products of small networks are too short to be shared between cores.
        wide = options.hidden_features > 256 and not gpus
        cpus = min(8.0, max(1.0, there.get("CPU", 1.0) // max(1, workers))) if wide else 1.0
    resources = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    if options.accelerator is not None:
        name = f"accelerator_type:{options.accelerator}"
        if not gpus or name not in there:
            kinds = sorted(key.partition(":")[2] for key in there if key.startswith("accelerator_"))
            raise InputError(
                f"train.accelerator is {options.accelerator!r}; the Ray cluster has "
                f"{', '.join(kinds) or 'no GPUs'}; leave it out to take any"
            )
    least = options.min_workers or workers
    if least > max(1, workers):
        raise InputError(
            f"train.min_workers is {least}, more than train.workers, which is {workers}"
        )
    if not workers and gpus and not torch.cuda.is_available():
        raise InputError(
            f"train.gpus_per_worker is {gpus:g}, and torch finds no GPU on this machine; leave it "
            "out to train on the CPU"
        )
    if workers:
        require(resources, min(least, workers), "train.workers")
    return Placement(workers, least, resources)
