"""The options of the ``train`` stage: the density estimator and its optimization."""

from __future__ import annotations

import dataclasses

from sbi_dist.options import Options, option

__all__ = ["TrainOptions"]


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
    batch_size: int | None = option(
        None, "simulations in an optimizer step, over all workers; default: by dataset size", ge=1
    )
    learning_rate: float = option(5e-4, "peak learning rate of AdamW", gt=0, le=1)
    weight_decay: float = option(1e-4, "weight decay of AdamW", ge=0, le=10)
    clip_norm: float = option(5.0, "largest norm of a gradient", gt=0)
    validation_fraction: float = option(
        0.1, "fraction of simulations held out to choose the weights", gt=0, lt=1
    )
    patience: int | None = option(
        None,
        "epochs without a better validation loss before the learning rate is lowered; default: by "
        "dataset size",
        ge=1,
    )
    decays: int = option(
        3, "how often the learning rate is lowered before training stops", ge=0, le=20
    )
    schedule: str = option(
        "plateau",
        "learning rate: plateau lowers it when the validation loss stops falling and then stops; "
        "cosine lowers it to zero over max_epochs",
        choices=("plateau", "cosine"),
    )
    max_epochs: int = option(1000, "stop after so many epochs at the latest", ge=1)
    max_seconds: float | None = option(
        None, "stop after so many seconds of training at the latest", gt=0
    )
    seed: int = option(0, "seed of the split, the initial weights and the order of batches", ge=0)
    workers: int = option(
        1,
        "Ray Train workers; 0 trains in the process that asks for it",
        ge=0,
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
    checkpoint_every_s: float = option(
        30.0, "seconds between checkpoints (at ends of epochs)", ge=0, outcome=False
    )
