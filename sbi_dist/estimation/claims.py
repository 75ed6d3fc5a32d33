"""What a bundle of unknown origin claims, checked before anything is made of it.

``bundle.json`` may have been written by anyone, and its checksum proves nothing. So that a bundle
can cost no more than a small multiple of its files' size, in memory and in time, it is refused
here if it nests deeper, names more or is of other types than one that was written by
``save_bundle``, or if its architecture has more weights than the file holds. The checks of numbers
are where these are read: ``Standardization``, ``OutOfDistribution``, ``priors``.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.size import load_seconds, num_weights

__all__ = ["checked_names", "checked_options", "checked_shape", "checked_sizes", "parsed"]

# In the text: each costs up to 250 bytes, whatever the text's size.
_MOST_OBJECTS, _MOST_ARRAYS, _MOST_QUOTES = 100_000, 5_000_000, 5_000_000
_MOST_DIMENSIONS, _LONGEST_NAME, _LONGEST_OPTION = 16, 200, 1000
_MOST_PARAMETERS = 10_000
# Numbers that the widest layer of an embedding gives for one x.
_MOST_EMBEDDED = 1 << 28
# Of weights.safetensors: the names, shapes and places of its tensors.
_LARGEST_HEADER = 16 * 1024**2


def parsed(text: bytes) -> dict[str, Any]:
    """The content of ``bundle.json``.

    Raises:
        ValueError or RecursionError: it is no JSON object, or larger in memory than it looks.
    """
    for mark, most in ((b"{", _MOST_OBJECTS), (b"[", _MOST_ARRAYS), (b'"', _MOST_QUOTES)):
        if text.count(mark) > most:
            raise ValueError(f"over {most:,} times {mark.decode()}")
    content = json.loads(text.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if b"\\u" in text:
        # Half a surrogate pair is no text: nothing that answers with it could be encoded.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


_HINTS = typing.get_type_hints(TrainOptions)
_TYPES = {
    field.name: typing.get_args(_HINTS[field.name]) or (_HINTS[field.name],)
    for field in dataclasses.fields(TrainOptions)
}


def checked_options(data: dict[str, Any]) -> TrainOptions:
    """Options of the types that they are declared with; those of other versions are left out."""
    options = {name: data[name] for name in _TYPES if name in data}
    for name, value in options.items():
        kind, allowed = type(value), _TYPES[name]
        if kind not in allowed and not (kind is int and float in allowed):
            raise TypeError(f"{name} is of type {kind.__name__}")
        if kind is str and len(value) > _LONGEST_OPTION:
            raise ValueError(f"{name} has {len(value):,} characters")
    return TrainOptions(**options)


def checked_shape(data: Any) -> tuple[int, ...]:
    """Shape of one x."""
    if not isinstance(data, list) or len(data) > _MOST_DIMENSIONS:
        raise ValueError("x_shape is no list of a few lengths")
    if not all(type(length) is int and length > 0 for length in data):
        raise ValueError("x_shape holds what is no length")
    return tuple(data)


def checked_names(content: dict[str, Any], parameters: int) -> None:
    """Refuse names and units of parameters that are no short texts, or not one for each."""
    for key in ("parameter_names", "parameter_units"):
        texts = content.get(key) or []
        if not isinstance(texts, list) or len(texts) not in (0, parameters):
            raise ValueError(f"{key} does not have {parameters} texts")
        if not all(isinstance(text, str) and len(text) <= _LONGEST_NAME for text in texts):
            raise ValueError(f"{key} holds what is no text of up to {_LONGEST_NAME} characters")


def checked_sizes(
    flows: list[tuple[TrainOptions, int]],
    x_shape: tuple[int, ...],
    weights: bytes,
    most_seconds: float,
) -> None:
    """Refuse architectures that the weights can't fill, before memory is taken for them.

    Args:
        flows: of each member, its options and its number of parameters.
        x_shape: shape of one x.
        weights: the content of ``weights.safetensors``.
        most_seconds: that loading may take, besides reading.
    """
    if int.from_bytes(weights[:8], "little") > _LARGEST_HEADER:
        raise ValueError("the weights have too many names")
    total, seconds = 0, 0.0
    for options, parameters in flows:
        if not 1 <= parameters <= _MOST_PARAMETERS:
            raise ValueError(f"it has {parameters:,} parameters")
        if options.embedding == "permutation_invariant":
            embedded = x_shape[0] * options.embedding_hidden if x_shape else 0
            if embedded > _MOST_EMBEDDED:
                raise ValueError("its embedding is too wide for so many trials")
        total += num_weights(options, parameters, x_shape)
        seconds += load_seconds(options, parameters)
    if 4 * total > len(weights):
        raise ValueError("the architecture does not fit the weights")
    if seconds > most_seconds:
        raise ValueError(f"it would take over {most_seconds:.0f} s to load")
