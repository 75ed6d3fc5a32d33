"""The containers that KubeRay's operator makes of its resources: commands and variables.

Of ray-operator/controllers/ray, v1.7.0: common/pod.go (each function here names its own), job.go
and rayjob_controller.go. What else a pod has is in tests/manifests/pods.py.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from tests.manifests.pods import clusters, pods, quantity
from tests.manifests.rendered import Resource, identity

__all__ = ["NAMESPACE", "domain", "ray_pods", "submitter"]

Pod = dict[str, Any]
NAMESPACE = "sbi-dist"
GCS_PORT = "6379"
_SHELL = ["/bin/bash", "-c", "--"]  # utils.GetContainerCommand


def domain(cluster: str) -> str:
    """Where a cluster's head is found (utils.GenerateFQDNServiceName)."""
    return f"{cluster}-head-svc.{NAMESPACE}.svc.cluster.local"


def ray_pods(resource: Resource, cluster: str) -> dict[str, Pod]:
    """The pods of a RayCluster, RayJob or RayService whose cluster has this name.

    Returns:
        Templates for ``head`` and for each group of workers, by its name.
    """
    named = copy.deepcopy(resource)
    named["metadata"]["name"] = cluster
    (spec,) = clusters(named)
    made = {
        key.removeprefix(f"{identity(named)} "): pod
        for key, pod in pods(named).items()
        if key.rpartition(" ")[2] not in ("cleanup", "submitter")
    }
    for name, pod in made.items():
        parameters = dict(_group(spec, name).get("rayStartParams") or {})
        ray = pod["spec"]["containers"][0]
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
            _token(container, cluster)
        if name == "head":
            _fault_tolerant_head(spec, ray, parameters, cluster)
            if spec.get("enableInTreeAutoscaling"):
                # setAutoscalerV2EnvVars
                parameters["no-monitor"] = "true"
                _add(ray, "RAY_enable_autoscaler_v2", "true")
                _autoscaler(pod["spec"]["containers"][1])
        else:
            (waiting,) = pod["spec"]["initContainers"]
            waiting["args"] = [_wait_for(domain(cluster))]
            if spec.get("gcsFaultToleranceOptions"):  # configureGCSFaultTolerance
                _add(ray, "RAY_gcs_rpc_server_reconnect_timeout_s", "600")
        command = _start(name, ray, parameters, cluster)
        # BuildPod
        ray["command"], ray["args"] = _SHELL, [
            f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {command}"
        ]  # fmt: skip
        _variables(resource["kind"], name, pod, cluster, command)
        if resource["kind"] == "RayService":
            _serving(ray, name)
    return made


def submitter(resource: Resource, cluster: str, job: str) -> Pod:
    """The pod that submits a RayJob in K8sJobMode (configureSubmitterContainer).

    Args:
        job: the submission's id (``status.jobId``).
    """
    pod = copy.deepcopy(resource["spec"]["submitterPodTemplate"])
    (container,) = pod["spec"]["containers"]
    address = f"http://{domain(cluster)}:8265"
    assert not container.get("command"), "has a command of its own"
    container["command"] = ["/bin/bash", "-ce", "--"]
    container["args"] = [_submission(resource["spec"], address, job)]
    _add(container, "PYTHONUNBUFFERED", "1")
    _add(container, "RAY_DASHBOARD_ADDRESS", f"{domain(cluster)}:8265")
    _add(container, "RAY_JOB_SUBMISSION_ID", job)
    _add(container, "RAY_AUTH_MODE", "token")
    secret = {"secretKeyRef": {"name": cluster, "key": "auth_token"}}
    container["env"].append({"name": "RAY_AUTH_TOKEN", "valueFrom": secret})
    return pod


def _submission(spec: dict[str, Any], address: str, job: str) -> str:
    """BuildJobSubmitCommand, in K8sJobMode: one that is retried goes on with the log."""
    healthy = (
        'python -c "import urllib.request; '
        f"r=urllib.request.urlopen('{address}/api/gcs_healthz', timeout=10); "
        "exit(0 if b'success' in r.read() else 1)\""
    )
    words = [
        f"until {healthy} >/dev/null 2>&1 ;",
        f'do echo "Waiting for Ray Dashboard GCS to become healthy at {address} ..." ; sleep 2 ;',
        "done ;",
        f"if ! ray job status --address {address} {job} >/dev/null 2>&1 ;",
        f"then ray job submit --address {address} --no-wait",
    ]
    if spec.get("metadata"):
        metadata = json.dumps(spec["metadata"], sort_keys=True, separators=(",", ":"))
        words.append(f"--metadata-json {json.dumps(metadata)}")  # strconv.Quote
    words += [f"--submission-id {job} -- {spec['entrypoint'].strip()} ; fi ;"]
    words += [f"ray job logs --address {address} --follow {job}"]
    return " ".join(words)


def _group(spec: dict[str, Any], name: str) -> dict[str, Any]:
    if name == "head":
        return spec["headGroupSpec"]
    (found,) = [each for each in spec["workerGroupSpecs"] if each["groupName"] == name]
    return found


def _token(container: dict[str, Any], cluster: str) -> None:
    """SetContainerTokenAuthEnvVars: the secret has the cluster's name."""
    for each in container.get("env", ()):
        if each["name"] == "RAY_AUTH_TOKEN":
            each["valueFrom"] = {"secretKeyRef": {"name": cluster, "key": "auth_token"}}


def _fault_tolerant_head(
    spec: dict[str, Any], ray: dict[str, Any], parameters: dict[str, str], cluster: str
) -> None:
    """configureRedisFT; in place of the resource's UID there is the cluster's name."""
    options = spec.get("gcsFaultToleranceOptions")
    if not options:
        return
    _add(ray, "RAY_external_storage_namespace", cluster)
    _add(ray, "RAY_REDIS_ADDRESS", options["redisAddress"])
    if options.get("redisPassword"):
        parameters["redis-password"] = "$REDIS_PASSWORD"
        ray.setdefault("env", []).append({"name": "REDIS_PASSWORD", **options["redisPassword"]})


def _autoscaler(container: dict[str, Any]) -> None:
    """BuildAutoscalerContainer."""
    for variable, path in {
        "RAY_CLUSTER_NAME": "metadata.labels['ray.io/cluster']",
        "RAY_CLUSTER_NAMESPACE": "metadata.namespace",
        "RAY_HEAD_POD_NAME": "metadata.name",
    }.items():
        field = {"fieldRef": {"fieldPath": path}}
        container.setdefault("env", []).append({"name": variable, "valueFrom": field})
    _add(container, "KUBERAY_CRD_VER", "v1")
    name = "--cluster-name $(RAY_CLUSTER_NAME) --cluster-namespace $(RAY_CLUSTER_NAMESPACE)"
    container["args"] = [f"ray kuberay-autoscaler {name}"]


def _wait_for(address: str) -> str:
    """What DefaultWorkerPodTemplate has before workers, without what it says meanwhile."""
    asked = f"ray health-check --address {address}:{GCS_PORT} > /dev/null 2>&1"
    return f"while true; do if {asked}; then echo GCS is ready.; break; fi; sleep 5; done"


def _start(name: str, ray: dict[str, Any], parameters: dict[str, str], cluster: str) -> str:
    """setMissingRayStartParams, generateRayStartCommand and convertParamMap."""
    if name == "head":
        parameters.setdefault("dashboard-host", "0.0.0.0")
    else:
        parameters.setdefault("address", f"{domain(cluster)}:{GCS_PORT}")
    parameters.setdefault("metrics-export-port", "8080")
    parameters["block"] = "true"
    parameters.setdefault("dashboard-agent-listen-port", "52365")
    limits, requests = ray["resources"].get("limits", {}), ray["resources"].get("requests", {})
    if cpu := limits.get("cpu") or requests.get("cpu"):
        parameters.setdefault("num-cpus", str(math.ceil(quantity(cpu))))
    if memory := limits.get("memory"):
        parameters.setdefault("memory", str(int(quantity(memory))))
    assert not any("/" in each for each in limits), "devices are not followed here"
    options = ""
    for key, value in sorted(parameters.items()):
        if value.lower() in ("true", "false"):
            options += f" --{key} " if value.lower() == "true" else ""
        else:
            options += f" --{key}={value} "
    return f"ray start {'--head ' if name == 'head' else ''}{options}"


def _variables(kind: str, name: str, pod: Pod, cluster: str, command: str) -> None:
    """setInitContainerEnvVars and setContainerEnvVars."""
    containers = list(pod["spec"].get("initContainers", ()))
    (ray, *_) = pod["spec"]["containers"]
    if name != "head":
        containers.append(ray)
    for container in containers:
        _add(container, "FQ_RAY_IP", domain(cluster))
        _add(container, "RAY_IP", domain(cluster).split(".")[0])
    for variable, path in {
        "RAY_CLUSTER_NAME": "metadata.labels['ray.io/cluster']",
        "RAY_CLUSTER_NAMESPACE": "metadata.namespace",
        "RAY_CLOUD_INSTANCE_ID": "metadata.name",
        "RAY_NODE_TYPE_NAME": "metadata.labels['ray.io/group']",
    }.items():
        field = {"fieldRef": {"fieldPath": path}}
        ray.setdefault("env", []).append({"name": variable, "valueFrom": field})
    _add(ray, "KUBERAY_GEN_RAY_START_CMD", command)
    _add(ray, "RAY_PORT", GCS_PORT)
    if kind == "RayService":
        _add(ray, "RAY_timeout_ms_task_wait_for_death_info", "0")
        _add(ray, "RAY_gcs_server_request_timeout_seconds", "5")
        _add(ray, "RAY_SERVE_KV_TIMEOUT_S", "5")
    _add(ray, "RAY_ADDRESS", f"{'127.0.0.1' if name == 'head' else domain(cluster)}:{GCS_PORT}")
    _add(ray, "RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    if name == "head":
        _add(ray, "RAY_USAGE_STATS_EXTRA_TAGS", f"kuberay_version=v1.7.0;kuberay_crd={kind}")
    _add(ray, "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1")


def _serving(ray: dict[str, Any], name: str) -> None:
    """initLivenessAndReadinessProbe: where replicas are, the proxy has to answer too."""
    if name != "head":
        asked = "wget --tries 1 -T {} -q -O- http://localhost:{} | grep success"
        command = " && ".join(
            [asked.format(2, "52365/api/local_raylet_healthz"), asked.format(10, "8000/-/healthz")]
        )
        ray["readinessProbe"] = {"exec": {"command": ["bash", "-c", command]}}


def _add(container: dict[str, Any], name: str, value: str) -> None:
    """One more variable, unless the manifest has it."""
    variables = container.setdefault("env", [])
    if not any(each["name"] == name for each in variables):
        variables.append({"name": name, "value": value})
