"""The pods that come of the manifests, as KubeRay's operator makes them of its resources.

Of ray-operator/controllers/ray/common/pod.go, v1.7.0: DefaultHeadPodTemplate,
DefaultWorkerPodTemplate, BuildPod; and of raycluster_controller.go: buildRedisCleanupJob. Only what
is checked here is followed: containers, volumes, security, accounts, labels; not commands.
"""

from __future__ import annotations

import copy
from typing import Any

from tests.manifests.rendered import Resource, identity

__all__ = ["clusters", "pods", "quantity"]

_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
          "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}  # fmt: skip
# BaseWgetHealthCommand, or an HTTP check from Ray 2.53 on, of the node's agent.
_HEALTH = {"httpGet": {"path": "/api/healthz", "port": 52365}}


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: it has no such form.
    """
    text = str(text)
    digits = text.rstrip("".join(set("".join(_UNITS))))
    return float(digits) * _UNITS[text[len(digits) :]]


def clusters(resource: Resource) -> list[dict[str, Any]]:
    """The specs of the Ray clusters of a resource: one, or none."""
    places = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    place = places.get(resource["kind"])
    if place is None:
        return []
    return [resource["spec"][place] if place else resource["spec"]]


def pods(resource: Resource) -> dict[str, dict[str, Any]]:
    """Templates of pods, with metadata and spec, by what they are."""
    found = {}
    for spec in clusters(resource):
        found["head"] = _head(resource, spec)
        for group in spec["workerGroupSpecs"]:
            found[group["groupName"]] = _worker(resource, spec, group)
        if spec.get("gcsFaultToleranceOptions"):
            found["redis cleanup"] = _redis_cleanup(found["head"])
    if resource["kind"] == "RayJob":
        found["submitter"] = copy.deepcopy(resource["spec"]["submitterPodTemplate"])
    if resource["kind"] in ("StatefulSet", "Deployment", "DaemonSet", "Job"):
        template = copy.deepcopy(resource["spec"]["template"])
        for claim in resource["spec"].get("volumeClaimTemplates") or ():
            name = claim["metadata"]["name"]
            template["spec"].setdefault("volumes", []).append(
                {"name": name, "persistentVolumeClaim": {"claimName": name}}
            )
        found["pod"] = template
    return {f"{identity(resource)} {name}": pod for name, pod in found.items()}


def _head(resource: Resource, spec: dict[str, Any]) -> dict[str, Any]:
    pod = copy.deepcopy(spec["headGroupSpec"]["template"])
    ray = pod["spec"]["containers"][0]
    pod["metadata"] = _labelled(pod, resource, "head", "headgroup")
    if spec.get("enableInTreeAutoscaling"):
        options = copy.deepcopy(spec.get("autoscalerOptions") or {})
        autoscaler = {
            "name": "autoscaler",
            "image": ray["image"],
            "imagePullPolicy": "IfNotPresent",
            "command": ["/bin/bash", "-c", "--"],
            "resources": {
                "limits": {"cpu": "500m", "memory": "512Mi"},
                "requests": {"cpu": "500m", "memory": "512Mi"},
            },
        }
        for field in ("resources", "image", "securityContext", "volumeMounts", "env", "envFrom"):
            if options.get(field):
                autoscaler[field] = options[field]
        pod["spec"]["containers"].append(autoscaler)
        for container in (ray, autoscaler):
            _empty_dir(pod, container, "ray-logs", "/tmp/ray", {})
        if spec.get("autoscalerOptions", {}).get("version") == "v2":
            pod["spec"]["restartPolicy"] = "Never"
    _ray(pod, spec)
    return pod


def _worker(resource: Resource, spec: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    pod = copy.deepcopy(group["template"])
    ray = pod["spec"]["containers"][0]
    pod["metadata"] = _labelled(pod, resource, "worker", group["groupName"])
    few = {"cpu": "200m", "memory": "256Mi"}
    waiting = {
        "name": "wait-gcs-ready",
        "command": ["/bin/bash", "-c", "--"],
        "resources": {"limits": few, "requests": few},
    }
    for field in ("image", "imagePullPolicy", "securityContext", "env", "volumeMounts"):
        if field in ray:
            waiting[field] = copy.deepcopy(ray[field])
    pod["spec"].setdefault("initContainers", []).append(waiting)
    if spec.get("enableInTreeAutoscaling") and spec["autoscalerOptions"].get("version") == "v2":
        pod["spec"]["restartPolicy"] = "Never"
    _ray(pod, spec)
    return pod


def _ray(pod: dict[str, Any], spec: dict[str, Any]) -> None:
    """What both have: memory for objects, probes, the port of metrics and the token."""
    ray = pod["spec"]["containers"][0]
    limits = ray["resources"].get("limits", {})
    shared = {"medium": "Memory", "sizeLimit": limits.get("memory")}
    _empty_dir(pod, ray, "shared-mem", "/dev/shm", shared)
    if not any(port.get("name") == "metrics" for port in ray.get("ports", ())):
        ray.setdefault("ports", []).append({"name": "metrics", "containerPort": 8080})
    ray.setdefault("livenessProbe", {**_HEALTH, "periodSeconds": 5, "failureThreshold": 120})
    ray.setdefault("readinessProbe", {**_HEALTH, "periodSeconds": 5, "failureThreshold": 10})
    if (spec.get("authOptions") or {}).get("mode") == "token":
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())]:
            source = {"secretKeyRef": {"name": "CLUSTER", "key": "auth_token"}}
            container.setdefault("env", []).extend(
                [
                    {"name": "RAY_AUTH_MODE", "value": "token"},
                    {"name": "RAY_AUTH_TOKEN", "valueFrom": source},
                ]
            )


def _redis_cleanup(head: dict[str, Any]) -> dict[str, Any]:
    pod = copy.deepcopy(head)
    pod["metadata"]["labels"]["ray.io/node-type"] = "redis-cleanup"
    (ray,) = pod["spec"]["containers"] = pod["spec"]["containers"][:1]
    few = {"cpu": "200m", "memory": "256Mi"}
    ray["resources"] = {"limits": few, "requests": few}
    del ray["livenessProbe"], ray["readinessProbe"]
    return pod


def _labelled(pod: dict[str, Any], resource: Resource, node: str, group: str) -> dict[str, Any]:
    metadata = pod.get("metadata") or {}
    labels = {
        "ray.io/is-ray-node": "yes",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **(metadata.get("labels") or {}),
        "ray.io/cluster": resource["metadata"]["name"],
        "ray.io/node-type": node,
        "ray.io/group": group,
    }
    return {**metadata, "labels": labels}


def _empty_dir(
    pod: dict[str, Any], container: dict[str, Any], name: str, path: str, source: dict[str, Any]
) -> None:
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == path for mount in mounts):
        return
    volumes = pod["spec"].setdefault("volumes", [])
    if not any(volume["name"] == name for volume in volumes):
        volumes.append({"name": name, "emptyDir": source})
    mounts.append({"name": name, "mountPath": path})
