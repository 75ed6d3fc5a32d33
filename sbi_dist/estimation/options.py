"""The options of the ``train`` stage: the density estimator and its optimization."""

from __future__ import annotations

import dataclasses

from sbi_dist.options import Options, option

__all__ = ["ARCHITECTURE", "TrainOptions"]

# The fields that two estimators must share for one to start from the weights of the other.
ARCHITECTURE = (
    "estimator",
    "transforms",
    "hidden_features",
    "blocks",
    "bins",
    "tail_bound",
    "embedding",
    "embedding_features",
    "embedding_hidden",
    "ensemble",
)


@dataclasses.dataclass(frozen=True)
class TrainOptions(Options):
    """The estimator, how it is trained, and on what."""

    estimator: str = option(
        "nsf",
        "nsf: neural spline flow; maf: masked autoregressive flow",
        choices=("nsf", "maf"),
    )
    transforms: int = option(5, "layers of the flow", ge=1, le=50)
    hidden_features: int = option(50, "width of the networks in each layer", ge=1, le=4096)
    blocks: int = option(2, "residual blocks in each network", ge=1, le=20)
    bins: int = option(10, "bins of a spline (nsf)", ge=2, le=100)
    tail_bound: float = option(
        4.0, "splines act on [-tail_bound, tail_bound], in sd; linear beyond", gt=0.5, le=50
    )
    dropout: float = option(0.0, "dropout probability in the networks", ge=0, lt=1)
    embedding: str = option(
        "none",
        "network that summarizes x: none, fully_connected, convolutional_1d, convolutional_2d, or "
        "permutation_invariant (rows of x are exchangeable)",
        choices=(
            "none",
            "fully_connected",
            "convolutional_1d",
            "convolutional_2d",
            "permutation_invariant",
        ),
    )
    embedding_features: int = option(20, "numbers that the embedding gives", ge=1, le=4096)
    embedding_hidden: int = option(64, "width of the embedding's layers", ge=1, le=4096)
    x_scale: str = option(
        "auto",
        "scale on which x is standardized: linear, log (x > 0), asinh (heavy tails), or auto",
        choices=("auto", "linear", "log", "asinh"),
    )
    ensemble: int = option(
        1, "estimators trained from different seeds; the posterior is their mixture", ge=1, le=100
    )
    warm_start: bool = option(
        False, "start from the newest model of fewer simulations of the same dataset"
    )
    batch_size: int | None = option(
        None, "simulations in an optimizer step, over all workers; default: by dataset size", ge=1
    )
    accumulate: int = option(
        1, "parts that a worker's share of a batch is computed in", ge=1, le=4096, outcome=False
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate of AdamW; default: 4e-3 for schedule average, 5e-4 for the others",
        gt=0,
        le=1,
    )
    weight_decay: float = option(1e-4, "weight decay of AdamW", ge=0, le=10)
    clip_norm: float = option(5.0, "largest norm of a gradient", gt=0)
    validation_fraction: float = option(
        0.1, "fraction of simulations held out to choose the weights", gt=0, lt=1
    )
    schedule: str = option(
        "average",
        "average: a rate that falls slowly, while a moving average of the weights is judged and "
        "kept; "
        "plateau: lowers the rate when the validation loss stops falling; cosine: lowers it to "
        "zero over max_epochs",
        choices=("average", "plateau", "cosine"),
    )
    patience: int | None = option(
        None,
        "epochs without a better validation loss before training stops (average) or its learning "
        "rate is lowered (plateau); default: by number of steps",
        ge=1,
    )
    decays: int = option(
        3, "how often plateau lowers the learning rate before training stops", ge=0, le=20
    )
    max_epochs: int = option(1000, "stop after so many epochs at the latest", ge=1)
    max_seconds: float | None = option(
        None, "stop after so many seconds of training at the latest", gt=0
    )
    shuffle_mb: float = option(
        64.0,
        "simulations that are shuffled among each other, in MB; more than this are shuffled in "
        "blocks first",
        gt=0,
    )
    seed: int = option(0, "seed of the split, the initial weights and the order of batches", ge=0)
    workers: int | str = option(
        "auto",
        "Ray Train workers; 0 trains in the process that asks; auto: one for each GPU, else one, "
        "or 0 on a Ray that the command started itself",
        ge=0,
        le=1024,
        choices=("auto",),
        outcome=False,
    )
    min_workers: int | None = option(
        None,
        "least workers to go on with while nodes are missing; default: all of them",
        ge=1,
        le=1024,
        outcome=False,
    )
    cpus_per_worker: float | None = option(
        None,
        "CPUs of a worker; default: 1, or up to 8 for hidden_features over 256",
        gt=0,
        outcome=False,
    )
    gpus_per_worker: float | None = option(
        None, "GPUs of a worker; default: one where the cluster has them", ge=0, outcome=False
    )
    accelerator: str | None = option(
        None, "type of the GPUs, as Ray names it (A100, H100, ...); default: any", outcome=False
    )
    memory_gb: float | None = option(
        None,
        "memory of a worker for simulations; more are streamed from the store; default: half of "
        "what is free",
        gt=0,
        outcome=False,
    )
    restarts: int = option(
        20, "how often workers that died are replaced before the job gives up", ge=0, outcome=False
    )
    checkpoint_every_s: float = option(30.0, "seconds between checkpoints", ge=0, outcome=False)
    checkpoint_every_epochs: int | None = option(
        None, "epochs between checkpoints, besides checkpoint_every_s", ge=1, outcome=False
    )
    checkpoints_kept: int = option(2, "newest checkpoints that are kept", ge=1, outcome=False)
