"""The posterior service over HTTP, and its clients."""

from __future__ import annotations

import importlib
from typing import Any

# Imported when first used: a replica needs no client, a client neither Ray nor a web framework.
_HOMES = {
    "AsyncClient": "sbi_dist.serving.client",
    "Client": "sbi_dist.serving.client",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sbi_dist.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
