"""What the README says to type for Kubernetes: that its names are those of the manifests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.manifests.pods import clusters
from tests.manifests.rendered import K8S, TARGETS, find, of_kind, resources
from tests.manifests.test_k8s_schemas import made
from tests.manifests.test_k8s_workloads import experiment
from tests.unit.test_runbook import unknown

ROOT = K8S.parent
TEXT = (ROOT / "README.md").read_text().partition("### Kubernetes\n")[2].partition("\n## ")[0]
COMMANDS = [
    re.sub(r" &$", "", line)
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]
APPLIED = [target for target in TARGETS if re.match(r"overlays/(local|cpu)/", target)]


def all_of(pattern: str) -> set[str]:
    return {found for line in COMMANDS for found in re.findall(pattern, line)}


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings within."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, (dict, list)):
            yield from walk(each)


def wanted(target: str, folder: Path) -> dict[str, set[str]]:
    """The secrets that pods of a target do not start without, with the keys that they read."""
    found: dict[str, set[str]] = {}
    for each in walk(resources(target)):
        for source in ("secretKeyRef", "secretRef", "secret"):
            reference = each.get(source)
            if not isinstance(reference, dict) or reference.get("optional"):
                continue
            if source == "secret":
                tokens = experiment(target, folder).serve.tokens_file
                assert reference["secretName"] == "sbi-dist-serve-tokens" and tokens is not None
                found.setdefault(reference["secretName"], set()).add(Path(tokens).name)
            else:
                found.setdefault(reference["name"], set()).add(reference["key"])
    return found


def test_it_creates_the_secrets_that_pods_wait_for(tmp_path: Path) -> None:
    created = {
        words[words.index("generic") + 1]: {
            each.split("=")[1] for each in words if each.startswith("--from-literal=")
        }
        for words in map(shlex.split, COMMANDS)
        if "generic" in words
    }
    needed: dict[str, set[str]] = {}
    for target in APPLIED:
        for name, keys in wanted(target, tmp_path).items():
            needed.setdefault(name, set()).update(keys)
    assert created == needed
    assert created.keys() == {"sbi-dist-redis", "sbi-dist-store", "sbi-dist-serve-tokens"}


def test_it_names_what_there_is() -> None:
    there = [each for target in APPLIED for each in resources(target)]

    def named(kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in there if each["kind"] == kind}

    assert all_of(r" -k k8s/(\S+)") <= set(TARGETS)
    assert all((ROOT / path).exists() for path in re.findall(r"\bk8s/[\w./-]*\w", TEXT))
    assert all_of(r"raycluster/(\S+)") == named("RayCluster")
    assert all_of(r"rayservice/(\S+)") == named("RayService")
    assert all_of(r"\bjob/(\S+)") <= named("RayJob")
    assert all_of(r"svc/(\S+)") <= {name for each in there for name in made(each)}
    # KubeRay's, of the cluster's name.
    assert all_of(r"get secret (\S+)") == named("RayCluster")
    namespaces = {name for line in COMMANDS for name in re.findall(r"^kubectl -n (\S+)", line)}
    assert namespaces == named("Namespace")


def test_it_installs_the_operator_where_policies_let_it_in() -> None:
    ((version, namespace),) = {
        found
        for line in COMMANDS
        for found in re.findall(r"kuberay-operator --version (\S+) -n (\S+)", line)
    }
    ingress = find("base", "NetworkPolicy", "ray-head")["spec"]["ingress"]
    peers = [peer for rule in ingress for peer in rule["from"] if "namespaceSelector" in peer]
    assert [peer["namespaceSelector"]["matchLabels"] for peer in peers] == [
        {"kubernetes.io/metadata.name": namespace}
    ]
    assert re.findall(r"KubeRay (\d+\.\d+)\.", TEXT) == [version.rpartition(".")[0]]


def test_it_asks_for_what_was_made(tmp_path: Path) -> None:
    served = experiment("overlays/local/service", tmp_path)
    assert f"sbi-dist submit run {served.name} " in TEXT and f" --store {served.store}\n" in TEXT
    images = {
        container["image"]
        for resource in of_kind("overlays/local/cluster", "RayCluster")
        for spec in clusters(resource)
        for container in spec["headGroupSpec"]["template"]["spec"]["containers"]
    }
    assert all_of(r"-t (\S+)") == all_of(r"docker-image (\S+)") == images


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("sbi-dist")])
def test_its_commands_are_known(line: str) -> None:
    assert unknown(line) == []
