"""What KubeRay's operator refuses, beyond the schemas of its kinds.

Of ray-operator/controllers/ray/utils/validation.go and constant.go, v1.7.0, with the feature gates
as they are by default (pkg/features/features.go). Rules about fields that no gate of these lets
through (history server, TLS, embedded GCS storage, KubeRay's network policies) come to: not set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

__all__ = ["check"]

Spec = dict[str, Any]

_LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_DNS1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
# Alpha, off by default.
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+")


def check(resource: dict[str, Any]) -> list[str]:
    """What the operator would refuse a RayCluster, RayJob or RayService for."""
    checks = {"RayCluster": _cluster, "RayJob": _job, "RayService": _service}
    return [*_metadata(resource), *checks[resource["kind"]](resource)]


def _metadata(resource: dict[str, Any]) -> Iterator[str]:
    name, kind = resource["metadata"]["name"], resource["kind"]
    if len(name) > _LONGEST[kind]:
        yield f"metadata.name: has more than {_LONGEST[kind]} characters"
    if not _DNS1035.fullmatch(name) or len(name) > 63:
        yield "metadata.name: is no DNS-1035 label"


def _cluster(resource: dict[str, Any]) -> Iterator[str]:
    yield from _cluster_spec(resource["spec"], resource["metadata"].get("annotations") or {})


def _cluster_spec(spec: Spec, annotations: dict[str, str]) -> Iterator[str]:
    head = spec["headGroupSpec"]
    if not head["template"]["spec"].get("containers"):
        yield "headGroupSpec: has no container"
        return
    yield from _group("Head", head)
    for group in spec.get("workerGroupSpecs") or ():
        name = group["groupName"]
        if not group["template"]["spec"].get("containers"):
            yield f"{name}: has no container"
            return
        yield from _group(name, group)
        yield from _worker_group(name, group, spec)
    yield from _fault_tolerance(spec, annotations)
    yield from _autoscaling(spec)
    yield from _authentication(spec)
    for field, gate in _GATED.items():
        if spec.get(field) is not None:
            yield f"{field}: needs the feature gate {gate}"


def _group(name: str, group: Spec) -> Iterator[str]:
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and any(parameters.get(field) for field in _RESOURCES):
        yield f"{name}: resources are set in rayStartParams too"
    if "labels" in parameters:
        yield f"{name}: labels belong in the group's labels"
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(key) or len(value) > 63 or not _LABEL.fullmatch(value):
            yield f"{name}: label {key}={value} has no valid form"


def _worker_group(name: str, group: Spec, spec: Spec) -> Iterator[str]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not spec.get("enableInTreeAutoscaling") and (least is None or most is None):
        yield f"{name}: minReplicas and maxReplicas have to be set without autoscaling"
    if (least or 0) < 0 or (most or 0) < 0:
        yield f"{name}: minReplicas or maxReplicas is negative"
    if least is not None and most is not None and least > most:
        yield f"{name}: minReplicas is over maxReplicas"
    idle = group.get("idleTimeoutSeconds")
    if idle is not None and idle < 0:
        yield f"{name}: idleTimeoutSeconds is negative"
    if idle is not None and not _is_v2(spec):
        yield f"{name}: idleTimeoutSeconds needs autoscaler v2"
    if group.get("priority"):
        if _version(spec) < (2, 56, 0):
            yield f"{name}: priority needs rayVersion 2.56.0"
        if not _is_v2(spec):
            yield f"{name}: priority needs autoscaler v2"
    if group.get("suspend") and spec.get("enableInTreeAutoscaling"):
        yield f"{name}: can't be suspended with autoscaling"


def _fault_tolerance(spec: Spec, annotations: dict[str, str]) -> Iterator[str]:
    options = spec.get("gcsFaultToleranceOptions")
    parameters = spec["headGroupSpec"].get("rayStartParams") or {}
    variables = _variables(spec)
    if annotations.get("ray.io/ft-enabled") and options is not None:
        yield "gcsFaultToleranceOptions: the annotation ray.io/ft-enabled is set too"
    by_annotation = annotations.get("ray.io/ft-enabled", "").lower() == "true"
    if options is None and not by_annotation and "RAY_REDIS_ADDRESS" in variables:
        yield "gcsFaultToleranceOptions: RAY_REDIS_ADDRESS is set without it"
    if options is not None:
        if parameters.get("redis-password"):
            yield "gcsFaultToleranceOptions: redis-password is in rayStartParams"
        for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
            if name in variables:
                yield f"gcsFaultToleranceOptions: {name} is in the head's environment"
        if annotations.get("ray.io/external-storage-namespace"):
            yield "gcsFaultToleranceOptions: ray.io/external-storage-namespace is set too"
        if options.get("backend") == "rocksdb":
            yield "gcsFaultToleranceOptions: needs the gate GCSFaultToleranceEmbeddedStorage"
        elif options.get("storage") is not None:
            yield "gcsFaultToleranceOptions: storage is for the backend rocksdb"
    if parameters.get("redis-username") or "REDIS_USERNAME" in variables:
        yield "gcsFaultToleranceOptions: the user of Redis belongs in it"


def _autoscaling(spec: Spec) -> Iterator[str]:
    options = spec.get("autoscalerOptions") or {}
    variables = _variables(spec)
    if not spec.get("enableInTreeAutoscaling"):
        if variables.get(_AUTOSCALER_V2) in ("1", "true"):
            yield f"{_AUTOSCALER_V2}: is set without autoscaling"
    else:
        if options.get("version") and _AUTOSCALER_V2 in variables:
            yield f"{_AUTOSCALER_V2}: autoscalerOptions.version is set too"
        if options.get("version") == "v2":
            groups = [spec["headGroupSpec"], *(spec.get("workerGroupSpecs") or ())]
            for group in groups:
                if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                    yield "restartPolicy: has to be Never with autoscaler v2"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds: is negative"
    if any(each["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for each in options.get("env") or ()):
        yield "autoscalerOptions.env: KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's"


def _authentication(spec: Spec) -> Iterator[str]:
    options = spec.get("authOptions") or {}
    if options.get("mode") != "token":
        if options.get("enableK8sTokenAuth"):
            yield "authOptions.enableK8sTokenAuth: mode is not token"
        return
    if _version(spec) < (2, 52, 0):
        yield "authOptions.mode: token needs rayVersion 2.52.0"
    if options.get("enableK8sTokenAuth"):
        if _version(spec) < (2, 55, 0):
            yield "authOptions.enableK8sTokenAuth: needs rayVersion 2.55.0"
        if options.get("secretName"):
            yield "authOptions.enableK8sTokenAuth: secretName is set too"


def _job(resource: dict[str, Any]) -> Iterator[str]:
    spec = resource["spec"]
    selector, cluster = spec.get("clusterSelector"), spec.get("rayClusterSpec")
    ttl, mode = spec.get("ttlSecondsAfterFinished", 0), spec.get("submissionMode", "K8sJobMode")
    backoff = spec.get("backoffLimit")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend: needs shutdownAfterJobFinishes"
    # No enumeration; another is an error only when the job is to be submitted (job.go).
    if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        yield f"submissionMode: {mode!r} is unknown"
    if ttl < 0:
        yield "ttlSecondsAfterFinished: is negative"
    if ttl > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if spec.get("deletionStrategy") is not None:
        # The jobs here have none; its rules are a page of their own.
        yield "deletionStrategy: is not checked here; use shutdownAfterJobFinishes"
    if cluster is None and not selector:
        yield "rayClusterSpec: this or clusterSelector has to be set"
    if selector:
        if spec.get("suspend"):
            yield "suspend: is not for a clusterSelector"
        if not selector.get("ray.io/cluster"):
            yield "clusterSelector: ray.io/cluster is empty"
        if mode == "SidecarMode":
            yield "submissionMode: SidecarMode is not for a clusterSelector"
        if (backoff or 0) > 0:
            yield "backoffLimit: is not for a clusterSelector"
    if mode == "InteractiveMode" and (backoff or 0) > 0:
        yield "backoffLimit: is not for InteractiveMode"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig"):
            if spec.get(field) is not None:
                yield f"{field}: is not for SidecarMode"
        if cluster is not None:
            pod = cluster["headGroupSpec"]["template"]["spec"]
            if pod.get("restartPolicy", "Never") != "Never":
                yield "restartPolicy: of the head has to be Never in SidecarMode"
    if cluster is not None:
        if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield "authOptions.enableK8sTokenAuth: is not for a RayJob"
        yield from _cluster_spec(cluster, resource["metadata"].get("annotations") or {})
        if (cluster.get("upgradeStrategy") or {}).get("type"):
            yield "upgradeStrategy: is not for the cluster of a RayJob"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "runtimeEnvYAML: is no YAML of a mapping"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field) is not None and spec[field] <= 0:
            yield f"{field}: has to be positive"
    if backoff is not None and backoff < 0:
        yield "backoffLimit: is negative"


def _service(resource: dict[str, Any]) -> Iterator[str]:
    spec, annotations = resource["spec"], resource["metadata"].get("annotations") or {}
    timeout = annotations.get("ray.io/initializing-timeout", "")
    if timeout and not (_DURATION.fullmatch(timeout) or re.fullmatch(r"[1-9][0-9]*", timeout)):
        yield "ray.io/initializing-timeout: is no duration"
    cluster = spec["rayClusterConfig"]
    if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth: is not for a RayService"
    yield from _cluster_spec(cluster, annotations)
    if ((cluster["headGroupSpec"].get("headService") or {}).get("metadata") or {}).get("name"):
        yield "headService.metadata.name: may not be set"
    if (cluster.get("upgradeStrategy") or {}).get("type"):
        yield "rayClusterConfig.upgradeStrategy: is not for the cluster of a RayService"
    strategy = (spec.get("upgradeStrategy") or {}).get("type")
    if strategy not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy.type: {strategy!r} is unknown"
    if strategy == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(spec, cluster)
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds: is negative"


def _incremental(spec: Spec, cluster: Spec) -> Iterator[str]:
    options = spec["upgradeStrategy"].get("clusterUpgradeOptions")
    if not cluster.get("enableInTreeAutoscaling"):
        yield "upgradeStrategy.type: an incremental upgrade needs autoscaling"
    if options is None:
        yield "upgradeStrategy.clusterUpgradeOptions: is required for an incremental upgrade"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not (0 <= step <= surge <= 100):
        yield "upgradeStrategy.clusterUpgradeOptions: 0 <= step <= surge <= 100 does not hold"
    if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
        yield "upgradeStrategy.clusterUpgradeOptions: interval or gateway class is missing"


def _variables(spec: Spec) -> dict[str, str]:
    """The environment of the head's first container, which is Ray's."""
    container = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    return {each["name"]: each.get("value", "") for each in container.get("env") or ()}


def _is_v2(spec: Spec) -> bool:
    by_variable = _variables(spec).get(_AUTOSCALER_V2) in ("1", "true")
    return (spec.get("autoscalerOptions") or {}).get("version") == "v2" or by_variable


def _version(spec: Spec) -> tuple[int, ...]:
    found = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.(\d+))?.*", spec.get("rayVersion") or "")
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)
