"""What is told of the server and of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sbi_dist
from sbi_dist.serving.open_inference.document import RequestParameters
from sbi_dist.serving.open_inference.protocol import EXTENSIONS, OUTPUTS, PLATFORM, VERSION

__all__ = ["model_config", "model_metadata", "server_metadata"]


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of the server."""
    return {"name": PLATFORM, "version": sbi_dist.__version__, "extensions": list(EXTENSIONS)}


def model_metadata(
    model_id: str, x_shape: Sequence[int], parameter_names: Sequence[str]
) -> dict[str, Any]:
    """Inputs and outputs of a model; ``properties`` names its parameters and a request's defaults.

    Args:
        x_shape: of one observation; -1 stands for any number of them, and for num_samples.
    """
    defaults = RequestParameters()
    return {
        "name": model_id,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, *x_shape]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shape}
            for name, datatype, shape in _outputs(len(parameter_names))
        ],
        "properties": {
            "parameter_names": ",".join(parameter_names),
            "num_samples": str(defaults.num_samples),
            "seed": str(defaults.seed),
        },
    }


_CONFIG_TYPES = {"FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}


def model_config(
    model_id: str, x_shape: Sequence[int], parameter_names: Sequence[str]
) -> dict[str, Any]:
    """The same as Triton's configuration of a model."""
    return {
        "name": model_id,
        "platform": PLATFORM,
        "backend": PLATFORM,
        # The number of observations is a dimension of the tensors; requests share batches anyway.
        "max_batch_size": 0,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, *x_shape]}],
        "output": [
            {"name": name, "data_type": _CONFIG_TYPES[datatype], "dims": shape}
            for name, datatype, shape in _outputs(len(parameter_names))
        ],
    }


def _outputs(num_parameters: int) -> list[tuple[str, str, list[int]]]:
    shapes = {"draws": [-1, -1, num_parameters], "log_prob": [-1, -1]}
    return [(name, datatype, shapes.get(name, [-1])) for name, (datatype, _) in OUTPUTS.items()]
