"""The Kubernetes manifests as `kubectl kustomize` renders them."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "K8S",
    "TARGETS",
    "Resource",
    "distinct",
    "find",
    "identity",
    "of_kind",
    "render",
    "resources",
]

Resource = dict[str, Any]

K8S = Path(__file__).parents[2] / "k8s"
# What is applied, and the base, which has to hold by itself.
TARGETS = sorted(
    str(path.parent.relative_to(K8S))
    for path in (*K8S.glob("base/kustomization.yaml"), *K8S.glob("overlays/*/*/kustomization.yaml"))
)


def kubectl() -> str:
    """The one beside Python, as its version is known; else that of the machine."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found is not None, "kubectl is missing; pip install -e '.[test]'"
    return found


def render(folder: Path) -> str:
    """What a folder with a kustomization comes to."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # Deprecated fields are told of there.
    assert done.stderr == ""
    return done.stdout


@functools.cache
def _resources(target: str) -> tuple[Resource, ...]:
    return tuple(yaml.safe_load_all(render(K8S / target)))


def resources(target: str) -> list[Resource]:
    """Those of a target, to be changed at will."""
    return copy.deepcopy(list(_resources(target)))


def of_kind(target: str, *kinds: str) -> list[Resource]:
    return [each for each in resources(target) if each["kind"] in kinds]


def find(target: str, kind: str, name: str) -> Resource:
    (found,) = [each for each in of_kind(target, kind) if each["metadata"]["name"] == name]
    return found


def identity(resource: Resource) -> str:
    return f"{resource['kind']} {resource['metadata']['name']}"


def distinct() -> list[tuple[str, Resource]]:
    """Every resource of every target, once each, with the target that it was found in first."""
    found = {
        json.dumps(each): target for target in reversed(TARGETS) for each in _resources(target)
    }
    return [(target, json.loads(text)) for text, target in found.items()]
