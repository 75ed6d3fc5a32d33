"""The checks of the manifests find what is wrong: each mutation of a valid manifest is caught."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import kubernetes_validate
import pytest

from tests.manifests import kuberay_rules
from tests.manifests.rendered import Resource, find, of_kind
from tests.manifests.structural import Schemas
from tests.manifests.test_k8s_schemas import schemas, validate  # noqa: F401

# Mappings with keys of the user's.
FREE = {"labels", "annotations", "rayStartParams", "requests", "limits", "matchLabels", "data",
        "default", "defaultRequest", "max", "min", "hard", "nodeLabels", "selector"}  # fmt: skip

RAY = [
    ("overlays/gpu/cluster", "RayCluster", "interactive"),
    ("overlays/kueue/jobs", "RayJob", "sbi-dist-train"),
    ("overlays/cpu/service", "RayService", "sbi-dist"),
]
OTHERS = [
    ("overlays/cpu/cluster", "PodMonitor", "ray"),
    ("overlays/kueue/queues", "ClusterQueue", "sbi-dist"),
    ("overlays/kueue/queues", "ResourceFlavor", "sbi-dist-gpu"),
    ("overlays/kueue/jobs", "LocalQueue", "sbi-dist"),
]
CORE = [
    ("overlays/local/cluster", kind, name)
    for kind, name in (
        ("NetworkPolicy", "ray-head"),
        ("NetworkPolicy", "store"),
        ("StatefulSet", "redis"),
        ("Service", "redis"),
        ("ResourceQuota", "sbi-dist"),
        ("LimitRange", "sbi-dist"),
        ("PriorityClass", "sbi-dist-simulator"),
        ("ServiceAccount", "sbi-dist-head"),
    )
] + [("overlays/cpu/service", "PodDisruptionBudget", "servers")]
Path = tuple[str | int, ...]


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything within, with where it is."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, each in inner:
        yield (*path, key), each
        yield from walk(each, (*path, key))


def at(resource: Resource, path: Path) -> Any:
    for key in path:
        resource = resource[key]
    return resource


def is_free(resource: Resource, path: Path) -> bool:
    # Not the labelSelector or the Service's own fields, but what is within those mappings; and what
    # is submitted to Ray with a job, which is also called metadata.
    within = path[:-1]
    if within[:1] == ("metadata",) or within == ("spec", "metadata"):
        return True
    if not within or within[-1] not in FREE:
        return False
    return all(not isinstance(each, (dict, list)) for each in at(resource, within).values())


def misspelt(resource: Resource) -> Iterator[tuple[str, Resource]]:
    for path, _ in walk(resource):
        if isinstance(path[-1], str) and len(path) > 1 and not is_free(resource, path):
            mutant = copy.deepcopy(resource)
            owner = at(mutant, path[:-1])
            owner[path[-1] + "s"] = owner.pop(path[-1])
            yield f"{path}", mutant


def of_wrong_type(resource: Resource) -> Iterator[tuple[str, Resource]]:
    wrong: dict[type, Any] = {dict: [1], list: {"a": 1}, str: {"a": 1}, int: [7], bool: "true"}
    for path, value in walk(resource):
        if len(path) > 1 and path[:1] != ("metadata",):
            mutant = copy.deepcopy(resource)
            at(mutant, path[:-1])[path[-1]] = wrong[type(value)]
            yield f"{path}", mutant


def without_what_is_required(resource: Resource) -> Iterator[tuple[str, Resource]]:
    required = ("name", "containers", "template", "headGroupSpec", "groupName", "mountPath",
                "containerPort", "topologyKey", "key", "maxSkew", "coveredResources", "flavors",
                "rayClusterConfig", "cidr", "operator")  # fmt: skip
    optional = {("tolerations", "key"), ("tolerations", "operator"), ("configMap", "name"),
                ("configMapRef", "name"), ("secretRef", "name"), ("secretKeyRef", "name"),
                ("ports", "name"), ("metadata", "name")}  # fmt: skip
    for path, _ in walk(resource):
        owners = [key for key in path[:-1] if isinstance(key, str)]
        if not owners or path[-1] not in required or path[0] == "metadata":
            continue
        if (owners[-1], path[-1]) in optional or is_free(resource, path):
            continue
        mutant = copy.deepcopy(resource)
        del at(mutant, path[:-1])[path[-1]]
        yield f"{path}", mutant


MUTATIONS = (misspelt, of_wrong_type, without_what_is_required)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("where", RAY + OTHERS, ids=lambda where: " ".join(where[::2]))
def test_definitions_find_it(
    schemas: Schemas,  # noqa: F811
    where: tuple[str, str, str],
    mutate: Callable[[Resource], Iterator[tuple[str, Resource]]],
) -> None:
    resource = find(*where)
    mutants = list(mutate(resource))
    missed = [name for name, mutant in mutants if not schemas.check(mutant)]
    assert missed == []
    assert len(mutants) >= (1 if where in OTHERS else 20) or mutate is without_what_is_required


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("where", CORE, ids=lambda where: " ".join(where[1:]))
def test_kubernetes_schemas_find_it(
    where: tuple[str, str, str],
    mutate: Callable[[Resource], Iterator[tuple[str, Resource]]],
) -> None:
    missed = []
    for name, mutant in mutate(find(*where)):
        try:
            validate(mutant, "1.32")
            missed.append(name)
        except kubernetes_validate.ValidationError:
            pass
    assert missed == []


# ---- enumerations, ranges and rules ----

CLUSTER = ("overlays/local/cluster", "RayCluster", "interactive")
JOB = ("overlays/cpu/jobs", "RayJob", "sbi-dist-run")
SUSPENDED, SERVICE = RAY[1:]
GONE = object()
HEAD = "spec.headGroupSpec"
ENV = f"{HEAD}.template.spec.containers.0.env.+"
OF_JOB = "spec.rayClusterSpec"
OF_SERVICE = "spec.rayClusterConfig"


def changed(where: tuple[str, str, str], changes: dict[str, Any]) -> Resource:
    """With values set at dotted paths; GONE removes, + at the end appends."""
    resource = find(*where)
    for dotted, value in changes.items():
        *parents, last = (int(key) if key.isdigit() else key for key in dotted.split("."))
        owner = resource
        for key in parents:
            owner = owner.setdefault(key, {}) if isinstance(owner, dict) else owner[key]
        if last == "+":
            owner.append(value)
        elif value is GONE:
            del owner[last]
        else:
            owner[last] = value
    return resource


STRATEGY = "spec.deletionStrategy"
RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}}


@pytest.mark.parametrize(
    ("where", "changes", "finding"),
    [
        (CLUSTER, {"spec.authOptions.mode": "tokens"}, ".spec.authOptions.mode: 'tokens' is none"),
        (CLUSTER, {"spec.autoscalerOptions.version": "v3"}, "'v3' is none of"),
        (CLUSTER, {"spec.autoscalerOptions.upscalingMode": "Fast"}, "'Fast' is none of"),
        (CLUSTER, {"spec.gcsFaultToleranceOptions.backend": "etcd"}, "'etcd' is none of"),
        (CLUSTER, {"spec.upgradeStrategy.type": "NewCluster"}, "'NewCluster' is none of"),
        (CLUSTER, {"spec.managedBy": "me"}, "managedBy"),
        (CLUSTER, {"spec.workerGroupSpecs.0.minReplicas": "1"}, "'1' is no integer"),
        (CLUSTER, {"spec.workerGroupSpecs.0.minReplicas": True}, "True is no integer"),
        (CLUSTER, {"spec.workerGroupSpecs.0.maxReplicas": 2**31}, "is no int32"),
        (CLUSTER, {"spec.workerGroupSpecs.0.replicas": None}, "replicas: is null"),
        (CLUSTER, {f"{HEAD}.rayStartParams.num-cpus": 0}, "0 is no string"),
        (
            CLUSTER,
            {f"{HEAD}.template.spec.containers.0.resources.limits.cpu": "two"},
            "'two' does not match",
        ),
        (
            CLUSTER,
            {f"{HEAD}.template.spec.containers.0.ports.1.containerPort": 6379},
            "has [6379, \"TCP\"] twice",
        ),
        (JOB, {f"{STRATEGY}.deletionRules": []}, "deletionRules: has 0 entries"),
        (
            JOB,
            {f"{STRATEGY}.deletionRules": [RULE], f"{STRATEGY}.onSuccess.policy": "DeleteNone"},
            "cannot be used together",
        ),
        (JOB, {f"{STRATEGY}.onSuccess.policy": "DeleteNone"}, "BOTH onSuccess and onFailure"),
        (
            JOB,
            {f"{STRATEGY}.deletionRules": [{**RULE, "condition": {"ttlSeconds": 1}}]},
            "either the JobStatus or the JobDeploymentStatus",
        ),
        (JOB, {"spec.managedBy": "kueue"}, "managedBy"),
        (
            OTHERS[1],
            {"spec.resourceGroups.0.coveredResources": ["cpu", "memory"]},
            "as the coveredResources",
        ),
        (OTHERS[1], {"spec.queueingStrategy": "FIFO"}, "'FIFO' is none of"),
        (OTHERS[2], {"spec.tolerations.0.value": "yes"}, "value"),
        (OTHERS[0], {"spec.podMetricsEndpoints.0.interval": "10 s"}, "does not match"),
    ],
)  # fmt: skip
def test_the_definitions_rules_hold(
    schemas: Schemas,  # noqa: F811
    where: tuple[str, str, str],
    changes: dict[str, Any],
    finding: str,
) -> None:
    found = schemas.check(changed(where, changes))
    assert any(finding.lower() in each.lower() for each in found), found


@pytest.mark.parametrize(
    ("where", "changes", "finding"),
    [
        (CLUSTER, {"metadata.name": "x" * 54}, "53 characters"),
        (CLUSTER, {"metadata.name": "1st"}, "DNS-1035"),
        (CLUSTER, {f"{HEAD}.template.spec.containers": []}, "no container"),
        (CLUSTER, {f"{HEAD}.resources": {"cpu": "1"}}, "in rayStartParams too"),
        (CLUSTER, {f"{HEAD}.rayStartParams.labels": "a=b"}, "group's labels"),
        (CLUSTER, {"spec.workerGroupSpecs.0.labels": {"a b": "c"}}, "no valid form"),
        (
            CLUSTER,
            {"spec.enableInTreeAutoscaling": False, "spec.workerGroupSpecs.1.minReplicas": GONE},
            "have to be set",
        ),
        (CLUSTER, {"spec.workerGroupSpecs.0.minReplicas": -1}, "is negative"),
        (CLUSTER, {"spec.workerGroupSpecs.0.minReplicas": 3}, "over maxReplicas"),
        (CLUSTER, {"spec.workerGroupSpecs.0.idleTimeoutSeconds": -1}, "idleTimeoutSeconds is neg"),
        (
            CLUSTER,
            {
                "spec.workerGroupSpecs.0.idleTimeoutSeconds": 9,
                "spec.autoscalerOptions.version": "v1",
            },
            "idleTimeoutSeconds needs",
        ),
        (
            CLUSTER,
            {"spec.workerGroupSpecs.0.priority": 1, "spec.rayVersion": "2.55.1"},
            "priority needs rayVersion",
        ),
        (
            CLUSTER,
            {"spec.workerGroupSpecs.0.priority": 1, "spec.autoscalerOptions.version": GONE},
            "priority needs autoscaler v2",
        ),
        (CLUSTER, {"spec.workerGroupSpecs.0.suspend": True}, "can't be suspended"),
        (CLUSTER, {"metadata.annotations": {"ray.io/ft-enabled": "true"}}, "annotation"),
        (CLUSTER, {f"{HEAD}.rayStartParams.redis-password": "x"}, "redis-password"),
        (CLUSTER, {ENV: {"name": "REDIS_PASSWORD", "value": "x"}}, "REDIS_PASSWORD"),
        (CLUSTER, {ENV: {"name": "REDIS_USERNAME", "value": "x"}}, "user of Redis"),
        (
            CLUSTER,
            {
                "spec.gcsFaultToleranceOptions": GONE,
                ENV: {"name": "RAY_REDIS_ADDRESS", "value": "x"},
            },
            "without it",
        ),
        (CLUSTER, {"spec.gcsFaultToleranceOptions.backend": "rocksdb"}, "Embedded"),
        (CLUSTER, {"spec.gcsFaultToleranceOptions.storage": {"size": "1Gi"}}, "backend rocksdb"),
        (
            CLUSTER,
            {
                "spec.enableInTreeAutoscaling": False,
                ENV: {"name": "RAY_enable_autoscaler_v2", "value": "1"},
            },
            "without autoscaling",
        ),
        (
            CLUSTER,
            {ENV: {"name": "RAY_enable_autoscaler_v2", "value": "1"}},
            "autoscalerOptions.version is set too",
        ),
        (CLUSTER, {f"{HEAD}.template.spec.restartPolicy": "Always"}, "has to be Never"),
        (CLUSTER, {"spec.autoscalerOptions.idleTimeoutSeconds": -1}, "is negative"),
        (
            CLUSTER,
            {"spec.autoscalerOptions.env": [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}]},
            "operator's",
        ),
        (CLUSTER, {"spec.rayVersion": "2.51.0"}, "2.52.0"),
        (CLUSTER, {"spec.rayVersion": GONE}, "2.52.0"),
        (
            CLUSTER,
            {"spec.authOptions": {"mode": "token", "enableK8sTokenAuth": True, "secretName": "x"}},
            "secretName",
        ),
        (CLUSTER, {"spec.authOptions": {"enableK8sTokenAuth": True}}, "mode is not token"),
        (CLUSTER, {"spec.networkPolicy.mode": "DenyAll"}, "feature gate"),
        (JOB, {"metadata.name": "x" * 48}, "47 characters"),
        (JOB, {"spec.shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished"),
        (JOB, {"spec.ttlSecondsAfterFinished": -1}, "is negative"),
        (JOB, {"spec.submissionMode": "K8sMode"}, "submissionMode"),
        (SUSPENDED, {"spec.shutdownAfterJobFinishes": False}, "suspend: needs"),
        (JOB, {OF_JOB: GONE}, "has to be set"),
        (JOB, {"spec.clusterSelector": {"ray.io/cluster": "x"}}, "backoffLimit"),
        (JOB, {"spec.submissionMode": "InteractiveMode"}, "InteractiveMode"),
        (JOB, {"spec.submissionMode": "SidecarMode"}, "submitterPodTemplate"),
        (JOB, {f"{OF_JOB}.authOptions.enableK8sTokenAuth": True}, "not for a RayJob"),
        (JOB, {f"{OF_JOB}.upgradeStrategy.type": "Recreate"}, "upgradeStrategy"),
        (JOB, {"spec.runtimeEnvYAML": "a: ]"}, "runtimeEnvYAML"),
        (JOB, {"spec.activeDeadlineSeconds": 0}, "has to be positive"),
        (JOB, {"spec.preRunningDeadlineSeconds": -1}, "has to be positive"),
        (JOB, {"spec.backoffLimit": -1}, "is negative"),
        (SERVICE, {"metadata.annotations": {"ray.io/initializing-timeout": "soon"}}, "duration"),
        (SERVICE, {"spec.upgradeStrategy.type": "Recreate"}, "unknown"),
        (SERVICE, {"spec.upgradeStrategy.type": "NewClusterWithIncrementalUpgrade"}, "required"),
        (SERVICE, {"spec.rayClusterDeletionDelaySeconds": -1}, "is negative"),
        (SERVICE, {f"{OF_SERVICE}.headGroupSpec.headService.metadata.name": "x"}, "may not be"),
        (SERVICE, {f"{OF_SERVICE}.workerGroupSpecs.0.minReplicas": 9}, "over maxReplicas"),
    ],
)
def test_the_operators_rules_hold(
    where: tuple[str, str, str], changes: dict[str, Any], finding: str
) -> None:
    assert kuberay_rules.check(changed(where, {})) == []
    found = kuberay_rules.check(changed(where, changes))
    assert any(finding in each for each in found), found


@pytest.mark.parametrize("kind", ["PrometheusRule"])
def test_a_rule_without_an_expression_is_found(schemas: Schemas, kind: str) -> None:  # noqa: F811
    (resource,) = of_kind("overlays/cpu/cluster", kind)
    assert schemas.check(resource) == []
    for field, wrong in (("expr", GONE), ("for", "5 minutes"), ("labels", {"severity": 1})):
        mutant = json.loads(json.dumps(resource))
        rules = [rule for group in mutant["spec"]["groups"] for rule in group["rules"]]
        rule = next(each for each in rules if field in each)
        if wrong is GONE:
            del rule[field]
        else:
            rule[field] = wrong
        assert len(schemas.check(mutant)) >= 1, field
