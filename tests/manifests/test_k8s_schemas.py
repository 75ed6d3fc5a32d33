"""The Kubernetes manifests against the schemas and rules of all that reads them."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.manifests import kuberay_rules
from tests.manifests.pods import pods, quantity
from tests.manifests.rendered import (
    K8S,
    TARGETS,
    Resource,
    distinct,
    identity,
    of_kind,
    render,
    resources,
)
from tests.manifests.structural import Schemas

HERE = Path(__file__).parent
CRDS = Path(os.environ.get("KUBERAY_CRDS") or K8S.parents[1] / "shared/kuberay-crds")
# The oldest that is meant to run them, and the newest that the schemas are there for.
VERSIONS = ("1.32", kubernetes_validate.latest_version())


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    if not (CRDS / "ray.io_rayclusters.yaml").exists():
        reason = f"KubeRay's definitions are not in {CRDS}; set KUBERAY_CRDS to where they are"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return _read(CRDS, HERE / "crds")


@functools.cache
def _read(*folders: Path) -> Schemas:
    return Schemas(*folders)


def validate(resource: Resource, version: str) -> None:
    """As the API server does: unknown fields are errors."""
    # The schemas know lists and mappings of JSON only.
    kubernetes_validate.validate(json.loads(json.dumps(resource)), version, strict=True)


# ---- rendering ----


@pytest.mark.parametrize("target", TARGETS)
def test_it_renders(target: str) -> None:
    assert len(resources(target)) > 3
    names = [identity(each) for each in resources(target)]
    assert len(set(names)) == len(names)


def test_what_there_is() -> None:
    for size in ("local", "cpu", "gpu"):
        kinds = {part: {each["kind"] for each in resources(f"overlays/{size}/{part}")}
                 for part in ("cluster", "jobs", "service")}  # fmt: skip
        assert "RayCluster" in kinds["cluster"]
        assert kinds["jobs"] - kinds["cluster"] == {"RayJob"}
        budget = {"PodDisruptionBudget"} if size != "local" else set()
        assert kinds["service"] - kinds["cluster"] == {"RayService", *budget}
        stages = {
            each["metadata"]["labels"]["sbi-dist.io/stage"]
            for each in of_kind(f"overlays/{size}/jobs", "RayJob")
        }
        assert stages == {"run", "simulate", "train", "calibrate", "infer", "report"}


def test_every_folder_is_part_of_something() -> None:
    used, left = set(), [K8S / target for target in TARGETS]
    while left:
        folder = left.pop().resolve()
        if folder in used:
            continue
        used.add(folder)
        text = (folder / "kustomization.yaml").read_text()
        left += [
            folder / name
            for name in re.findall(r"^ +- ([\w./-]+)$", text, flags=re.M)
            if (folder / name).is_dir()
        ]
    assert {path.parent.resolve() for path in K8S.rglob("kustomization.yaml")} <= used


@pytest.mark.parametrize("target", TARGETS)
def test_everything_is_in_the_namespace(target: str) -> None:
    anywhere = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor",
                "WorkloadPriorityClass"}  # fmt: skip
    for each in resources(target):
        namespace = each["metadata"].get("namespace")
        assert namespace == (None if each["kind"] in anywhere else "sbi-dist"), identity(each)


@pytest.mark.parametrize("target", TARGETS)
def test_config_maps_that_are_named_are_there(target: str) -> None:
    there = {each["metadata"]["name"] for each in of_kind(target, "ConfigMap")}
    for resource in resources(target):
        for what, pod in pods(resource).items():
            named = set(re.findall(r"'configMap(?:Ref)?': {[^{}]*'name': '([^']+)'", str(pod)))
            assert named - {"kube-root-ca.crt"} <= there, what


def made(resource: Resource) -> list[str]:
    """The names of the Services that are made of a resource.

    Of GenerateHeadServiceName and BuildServeService. The clusters of jobs and services have random
    letters at the end of theirs.
    """
    name = resource["metadata"]["name"]
    suffixes = {
        "Service": [""],
        "RayCluster": ["-head-svc"],
        "RayService": ["-head-svc", "-serve-svc"],
    }
    return [name + suffix for suffix in suffixes.get(resource["kind"], ())]


@pytest.mark.parametrize("target", TARGETS)
def test_no_service_is_two_resources(target: str) -> None:
    """The operator would point it at the one's pods and leave the other's without."""
    names = [name for each in resources(target) for name in made(each)]
    assert len(set(names)) == len(names)


def test_an_experiment_that_changes_is_a_new_cluster(tmp_path: Path) -> None:
    """Its ConfigMap gets another name, and so the service's cluster another spec."""
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "experiment.yaml").write_text("name: other\n")
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{os.path.relpath(K8S, folder)}/overlays/local/service]\n"
        "configMapGenerator:\n"
        "- {name: sbi-dist-experiment, namespace: sbi-dist, behavior: merge, "
        "files: [experiment.yaml]}\n"
    )
    text = render(folder)
    before = render(K8S / "overlays/local/service")
    (name,) = set(re.findall(r"sbi-dist-experiment-\w+", text))
    assert text.count(name) == before.count("sbi-dist-experiment-") == 6 and name not in before


# ---- schemas ----


def test_all_are_valid(schemas: Schemas) -> None:
    """Kubernetes' own kinds by its schemas, the others by their definitions."""
    for _, resource in distinct():
        if resource in schemas:
            assert schemas.check(resource) == [], identity(resource)
            metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": resource["metadata"]}
            validate(metadata, VERSIONS[-1])
        else:
            for version in VERSIONS:
                validate(resource, version)


def test_the_operator_takes_them() -> None:
    for _, resource in distinct():
        if resource["apiVersion"] == "ray.io/v1":
            assert kuberay_rules.check(resource) == [], identity(resource)


def test_pods_are_valid_as_the_operator_makes_them() -> None:
    for _, resource in distinct():
        for what, pod in pods(resource).items():
            metadata = {"name": "pod", **pod["metadata"]}
            validate(
                {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]},
                VERSIONS[-1],
            )
            assert inconsistent(pod["spec"]) == [], what
            # The job that cleans Redis keeps all volumes of the head.
            assert unused(pod["spec"]) == set() or what.endswith("redis cleanup"), what


def inconsistent(spec: dict[str, Any]) -> list[str]:
    """What the API server refuses a pod for, beyond its schema (core/validation)."""
    found = []
    volumes = [each["name"] for each in spec.get("volumes", ())]
    containers = [*spec["containers"], *spec.get("initContainers", ())]
    names = [each["name"] for each in containers]
    used = {mount["name"] for each in containers for mount in each.get("volumeMounts", ())}
    if len(set(volumes)) < len(volumes) or len(set(names)) < len(names):
        found.append("a name is there twice")
    if used - set(volumes):
        found.append(f"no volume {used - set(volumes)}")
    for each in containers:
        paths = [mount["mountPath"] for mount in each.get("volumeMounts", ())]
        ports = [port["name"] for port in each.get("ports", ())]
        if len(set(paths)) < len(paths) or len(set(ports)) < len(ports):
            found.append(f"{each['name']}: a path or port is there twice")
        limits = each["resources"].get("limits", {})
        for name, amount in each["resources"].get("requests", {}).items():
            if quantity(amount) > quantity(limits.get(name, amount)):
                found.append(f"{each['name']}: asks for more {name} than the limit")
    return found


def unused(spec: dict[str, Any]) -> set[str]:
    """Volumes that no container mounts."""
    containers = [*spec["containers"], *spec.get("initContainers", ())]
    used = {mount["name"] for each in containers for mount in each.get("volumeMounts", ())}
    return {each["name"] for each in spec.get("volumes", ())} - used
