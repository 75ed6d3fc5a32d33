"""What the protocol fixes, and the names of a posterior's input and outputs in it."""

from __future__ import annotations

__all__ = ["DATATYPES", "EXTENSIONS", "HEAD_LENGTH", "OUTPUTS", "PLATFORM", "VERSION"]

# Length of the JSON, where bytes of tensors follow it.
HEAD_LENGTH = "Inference-Header-Content-Length"
PLATFORM = "sbi_dist"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters")
# The only one: an id already says which model it is.
VERSION = "1"

# Datatypes in which x is read; it becomes float32.
DATATYPES = {
    "FP32": "<f4",
    "FP64": "<f8",
    "FP16": "<f2",
    **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
}
# Datatype of each output, and whether it is given to those who name none.
OUTPUTS: dict[str, tuple[str, bool]] = {
    "draws": ("FP32", True),
    "status": ("BYTES", True),
    "out_of_distribution": ("FP32", True),
    "out_of_distribution_p": ("FP32", True),
    "log_prob": ("FP32", False),
}
