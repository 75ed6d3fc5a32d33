"""What the manifests promise about rights, secrets, the network and resources."""

from __future__ import annotations

import base64
import copy
import itertools
import re
from typing import Any

import pytest
import yaml

from tests.manifests.pods import clusters, pods, quantity
from tests.manifests.rendered import K8S, TARGETS, distinct, find, identity, of_kind, resources
from tests.manifests.test_k8s_schemas import VERSIONS, validate

NAMESPACED = [target for target in TARGETS if target != "overlays/kueue/queues"]
PODS = {f"{target} {what}": pod for target, each in distinct() for what, pod in pods(each).items()}


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec["containers"], *spec.get("initContainers", ())]


# ---- Pod Security Standards, restricted ----

# https://kubernetes.io/docs/concepts/security/pod-security-standards/
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
           "projected", "secret"}  # fmt: skip


def violations(spec: dict[str, Any]) -> list[str]:
    """What the standard `restricted` refuses a pod for."""
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    pod = spec.get("securityContext") or {}
    found += [f"volume {each['name']}" for each in spec.get("volumes", ())
              if not (each.keys() - {"name"}) <= VOLUMES]  # fmt: skip
    if pod.get("sysctls"):
        found.append("sysctls")
    for each in containers(spec):
        own, name = each.get("securityContext") or {}, each["name"]
        whole = {**pod, **own}
        added = set((own.get("capabilities") or {}).get("add") or ())
        if own.get("privileged") or own.get("procMount", "Default") != "Default":
            found.append(f"{name}: privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: allowPrivilegeEscalation")
        if "ALL" not in ((own.get("capabilities") or {}).get("drop") or ()):
            found.append(f"{name}: capabilities")
        if added - {"NET_BIND_SERVICE"}:
            found.append(f"{name}: adds {added}")
        if whole.get("runAsNonRoot") is not True or whole.get("runAsUser") == 0:
            found.append(f"{name}: root")
        seccomp = (whole.get("seccompProfile") or {}).get("type")
        if seccomp not in ("RuntimeDefault", "Localhost"):
            found.append(f"{name}: seccompProfile")
        if any(port.get("hostPort") for port in each.get("ports", ())):
            found.append(f"{name}: hostPort")
    return found


@pytest.mark.parametrize("what", PODS)
def test_pods_are_restricted(what: str) -> None:
    spec = PODS[what]["spec"]
    assert violations(spec) == []
    for each in containers(spec):
        # And more than that: only what is mounted can be written to.
        assert each["securityContext"].get("readOnlyRootFilesystem") is True, each["name"]
        assert "/tmp" in {mount["mountPath"] for mount in each["volumeMounts"]} or (
            each["name"] == "redis"
        )
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsUser"] > 0


@pytest.mark.parametrize(
    "change",
    [
        {"hostNetwork": True},
        {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]},
        {"securityContext": {"runAsNonRoot": False}},
        {"securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "0"}]}},
        {"containers.allowPrivilegeEscalation": None},
        {"containers.capabilities": {"drop": ["NET_RAW"]}},
        {"containers.capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}},
        {"containers.privileged": True},
        {"containers.runAsUser": 0},
        {"containers.seccompProfile": {"type": "Unconfined"}},
    ],
    ids=str,
)
def test_a_pod_that_is_not_is_found(change: dict[str, Any]) -> None:
    spec = copy.deepcopy(next(iter(PODS.values()))["spec"])
    ((field, value),) = change.items()
    if field.startswith("containers."):
        spec["containers"][0]["securityContext"][field.split(".")[1]] = value
    else:
        spec[field] = value
        for each in containers(spec) if field == "securityContext" else ():
            each["securityContext"].pop("runAsNonRoot", None)
    assert violations(spec) != []


@pytest.mark.parametrize("target", NAMESPACED)
def test_the_namespace_asks_for_it(target: str) -> None:
    labels = find(target, "Namespace", "sbi-dist")["metadata"]["labels"]
    for mode in ("enforce", "warn", "audit"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"


# ---- rights and secrets ----


@pytest.mark.parametrize("target", NAMESPACED)
def test_accounts_have_no_token_but_the_autoscaler(target: str) -> None:
    accounts = {each["metadata"]["name"]: each for each in of_kind(target, "ServiceAccount")}
    assert not any(each["automountServiceAccountToken"] for each in accounts.values())
    for resource in resources(target):
        for what, pod in pods(resource).items():
            spec = pod["spec"]
            assert spec["automountServiceAccountToken"] is False, what
            assert spec["serviceAccountName"] in accounts, what
            tokens = {
                each["name"]
                for each in spec.get("volumes", ())
                if "serviceAccountToken" in str(each)
            }
            having = {each["name"] for each in containers(spec)
                      if tokens & {mount["name"] for mount in each["volumeMounts"]}}  # fmt: skip
            # Where there is no autoscaler, there is no token either.
            names = {each["name"] for each in containers(spec)}
            assert having == names & {"autoscaler"}, what
            assert tokens == set() or what.endswith(("head", "redis cleanup")), what
    # Rights are given by KubeRay alone, to the head's account.
    kinds = {each["kind"] for each in resources(target)}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


SECRETS = {"sbi-dist-redis", "sbi-dist-store", "sbi-dist-serve-tokens"}


def test_secrets_are_named_and_never_there() -> None:
    named = set()
    for target, resource in distinct():
        assert resource["kind"] != "Secret", target
        text = str(resource)
        named |= set(re.findall(r"'secret(?:Name|Ref|KeyRef)?': {[^{}]*'name': '([^']+)'", text))
        named |= set(re.findall(r"'secretName': '([^']+)'", text))
        for each in variables(resource):
            secret = re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", each["name"])
            assert not secret or "secretKeyRef" in each.get("valueFrom", {}), each
    assert named == SECRETS
    for _, resource in distinct():
        if resource["kind"] == "ConfigMap" and "dashboards" not in resource["metadata"]["name"]:
            assert suspicious(str(resource["data"])) == set(), identity(resource)


def variables(resource: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        each
        for pod in pods(resource).values()
        for container in containers(pod["spec"])
        for each in container.get("env", ())
    ]


def suspicious(text: str) -> set[str]:
    """What looks like a key: AWS's form, or much that is as random as one."""
    words = re.findall(r"[A-Za-z0-9+/=_-]{20,}", text)
    return {
        word
        for word in words
        if re.match(r"(AKIA|ASIA)[A-Z0-9]{16}", word)
        or (re.search(r"[0-9]", word) and re.search(r"[A-Z]", word) and re.search(r"[a-z]", word))
    }


def test_keys_look_suspicious() -> None:
    assert suspicious("AKIAIOSFODNN7EXAMPLE")
    assert suspicious(f"a: {base64.b64encode(bytes(range(100, 130))).decode()}")


def test_ray_asks_for_tokens() -> None:
    for _, resource in distinct():
        for spec in clusters(resource):
            # KubeRay makes the token, one a cluster: none is shared, none is here.
            assert spec["authOptions"] == {"mode": "token"}, identity(resource)


# ---- the network ----

RAY = ("head", "simulator", "trainer", "server")
WORKERS = RAY[1:]
KUBERAY, PROMETHEUS, DNS = "kuberay-system/kuberay-operator", "monitoring/prometheus", "dns"
# Of nodes, by link-local addresses: NodeLocal DNSCache, GKE's Cloud DNS, EKS Pod Identity's agent.
RESOLVERS, AGENT = ("169.254.20.10/32", "169.254.169.254/32"), "169.254.170.23/32"
# Who may go where: (from, to) and the ports. All else is denied.
EDGES: dict[tuple[str, str], set[str]] = {
    ("submitter", "head"): {"8265"},
    (KUBERAY, "head"): {"8265", "8000"},
    ("head", "redis"): {"6379"},
    **{(who, "head"): {"6379-6383", "8500", "10002-19999"} for who in WORKERS},
    **{("head", who): {"6380-6383", "10002-19999", "30000-31000", "52365"} for who in WORKERS},
    **{pair: {"1024-65535"} for pair in itertools.product(WORKERS, WORKERS)},
    **{(who, "store"): {"8333"} for who in RAY},
    ("client", "server"): {"8000"},
    ("namespace of clients", "server"): {"8000"},
    **{(PROMETHEUS, who): {"8080"} for who in (*RAY, "submitter", "redis", "store")},
}
ROLES = (*RAY, "submitter", "redis", "store", "client")


def edges(policies: list[dict[str, Any]], direction: str) -> dict[tuple[str, str], set[str]]:
    """What the policies of a direction allow, by roles of pods and names of others."""
    found: dict[tuple[str, str], set[str]] = {}
    for policy in policies:
        spec = policy["spec"]
        for rule in spec.get(direction, ()):
            here = [role for role in ROLES if selects(spec["podSelector"], role)]
            ports = {port_of(each) for each in rule["ports"]}
            for peer in rule["from" if direction == "ingress" else "to"]:
                for there, role in itertools.product(peers(peer), here):
                    pair = (there, role) if direction == "ingress" else (role, there)
                    found.setdefault(pair, set()).update(ports)
    return found


def selects(selector: dict[str, Any], role: str) -> bool:
    labels = {"sbi-dist.io/role": role, "app.kubernetes.io/part-of": "sbi-dist"}
    if role == "client":  # a pod of somebody else in the namespace
        labels = {"sbi-dist.io/client": "true"}
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions") or ():
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def peers(peer: dict[str, Any]) -> list[str]:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        # Not the address that a cloud's machine asks for its own credentials.
        assert block["cidr"] in (*RESOLVERS, AGENT) or "169.254.0.0/16" in block["except"]
        return [block["cidr"]]
    if "namespaceSelector" in peer:
        namespace = peer["namespaceSelector"]["matchLabels"]
        if namespace == {"sbi-dist.io/client": "true"}:
            return ["namespace of clients"]
        name = namespace["kubernetes.io/metadata.name"]
        pod = peer["podSelector"]
        if name == "kube-system":
            (expression,) = pod["matchExpressions"]
            assert (expression["key"], expression["operator"]) == ("k8s-app", "In")
            assert expression["values"] == ["kube-dns", "node-local-dns"]
            return [DNS]
        return [f"{name}/{pod['matchLabels']['app.kubernetes.io/name']}"]
    return [role for role in ROLES if selects(peer["podSelector"], role)]


def port_of(port: dict[str, Any]) -> str:
    protocol = "" if port["protocol"] == "TCP" else f"/{port['protocol']}"
    return f"{port['port']}{'-' + str(port['endPort']) if 'endPort' in port else ''}{protocol}"


@pytest.mark.parametrize("target", NAMESPACED)
def test_everything_is_denied_first(target: str) -> None:
    deny = find(target, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for each in of_kind(target, "NetworkPolicy"):
        spec = each["spec"]
        rules = [*spec.get("ingress", ()), *spec.get("egress", ())]
        # One without ports or peers would be one for all.
        assert all(rule["ports"] and (rule.get("from") or rule.get("to")) for rule in rules)
        types = {name for name in ("Ingress", "Egress") if name.lower() in spec}
        assert types <= set(spec["policyTypes"])


@pytest.mark.parametrize("target", NAMESPACED)
def test_just_these_ways_are_open(target: str) -> None:
    policies = of_kind(target, "NetworkPolicy")
    names = {each["metadata"]["name"] for each in policies}
    # Redis, the local store and the service bring policies of their own.
    brought = {
        ("head", "redis"): "redis",
        **{(who, "store"): "local-store" for who in RAY},
        ("client", "server"): "serve",
        ("namespace of clients", "server"): "serve",
    }
    incoming = {pair: ports for pair, ports in EDGES.items() if brought.get(pair, "dns") in names}
    assert edges(policies, "ingress") == incoming
    ours = (*RAY, "submitter", "client")
    outgoing = {pair: ports for pair, ports in incoming.items() if pair[0] in ours}
    outgoing |= {("head", "redis"): {"6379"}}
    resolvers = itertools.product(ROLES, (DNS, *RESOLVERS))
    outgoing |= {pair: {"53", "53/UDP"} for pair in resolvers}
    outgoing |= {(role, "0.0.0.0/0"): {"443"} for role in RAY}
    outgoing |= {(role, AGENT): {"80"} for role in RAY}
    outgoing["head", "0.0.0.0/0"] = {"443", "6443"}
    assert edges(policies, "egress") == outgoing


def test_the_example_of_a_policy_can_be_used() -> None:
    """It opens ways out of Ray's pods, and its file is where the kustomization says."""
    folder = K8S / "base/network"
    assert "# - yours.yaml " in (folder / "kustomization.yaml").read_text()
    policies = list(yaml.safe_load_all((folder / "yours.yaml").read_text()))
    names = {each["metadata"]["name"] for each in of_kind("base", "NetworkPolicy")}
    assert names.isdisjoint(each["metadata"]["name"] for each in policies)
    for each in policies:
        validate(each, VERSIONS[0])
        assert each["spec"].keys() == {"podSelector", "policyTypes", "egress"}
        assert any(selects(each["spec"]["podSelector"], role) for role in RAY)
        for rule in each["spec"]["egress"]:
            assert rule["to"] and rule["ports"]
            assert "169.254" not in str(rule)


def test_policies_name_the_ports_that_ray_takes() -> None:
    for _, resource in distinct():
        for spec in clusters(resource):
            groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
            for group in groups:
                start = group["rayStartParams"]
                taken = [int(start[name]) for name in
                         ("node-manager-port", "object-manager-port", "runtime-env-agent-port",
                          "dashboard-agent-grpc-port")]  # fmt: skip
                assert sorted(taken) == [6380, 6381, 6382, 6383]
                assert (start["min-worker-port"], start["max-worker-port"]) == ("10002", "19999")


def test_pods_have_the_roles_that_policies_select() -> None:
    selecting = re.compile(r"'sbi-dist.io/role': '(\w+)'")
    roles = {pod["metadata"]["labels"]["sbi-dist.io/role"] for pod in PODS.values()}
    assert roles == set(ROLES) - {"client"}
    named = {role for _, each in distinct() if each["kind"] == "NetworkPolicy"
             for role in selecting.findall(str(each))}  # fmt: skip
    assert named <= roles
    for each in PODS.values():
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "sbi-dist"


# ---- resources, probes, images, disruptions ----


@pytest.mark.parametrize("what", PODS)
def test_pods_say_what_they_take(what: str) -> None:
    spec = PODS[what]["spec"]
    for each in containers(spec):
        for kind in ("requests", "limits"):
            assert each["resources"][kind].keys() >= {"cpu", "memory"}, each["name"]
        # Memory can't be taken back: what is asked for is what there is.
        ray = each["name"] == "ray" and not what.endswith("cleanup")
        if ray:
            assert each["resources"]["requests"]["memory"] == each["resources"]["limits"]["memory"]
            # KubeRay rounds a limit up to a whole number of CPUs, and tells Ray of these.
            assert quantity(each["resources"]["limits"]["cpu"]) % 1 == 0
        if each["name"] in ("ray", "redis", "seaweedfs") and not what.endswith("cleanup"):
            assert each["livenessProbe"] and each["readinessProbe"]
    assert all("sizeLimit" in each["emptyDir"] for each in spec.get("volumes", ())
               if "emptyDir" in each)  # fmt: skip
    assert spec["priorityClassName"].startswith("sbi-dist-")


@pytest.mark.parametrize("what", PODS)
def test_images_have_a_version(what: str) -> None:
    for each in containers(PODS[what]["spec"]):
        name, _, tag = each["image"].rpartition(":")
        assert name and re.match(r"\d+\.\d+", tag), each["image"]
        assert each["imagePullPolicy"] == "IfNotPresent"


def test_one_version_of_ray() -> None:
    import ray

    versions = {spec["rayVersion"] for _, each in distinct() for spec in clusters(each)}
    assert versions == {ray.__version__}


@pytest.mark.parametrize("target", NAMESPACED)
def test_quota_has_room_for_all_that_may_be(target: str) -> None:
    """One cluster at its largest; a service twice, as while it is upgraded."""
    hard = find(target, "ResourceQuota", "sbi-dist")["spec"]["hard"]
    for resource in resources(target):
        for spec in clusters(resource):
            times = 2 if resource["kind"] == "RayService" else 1
            for name in ("cpu", "memory", "nvidia.com/gpu"):
                most = of_head = total(spec["headGroupSpec"]["template"]["spec"], name)
                for group in spec["workerGroupSpecs"]:
                    most += group["maxReplicas"] * total(group["template"]["spec"], name)
                assert of_head <= most and most * times <= quantity(hard[f"requests.{name}"])


def total(spec: dict[str, Any], name: str) -> float:
    return sum(quantity(each["resources"]["requests"].get(name, 0)) for each in spec["containers"])


def stops_drains(budget: dict[str, Any], least: int) -> bool:
    """Whether a budget of pods of KubeRay's, of which there are so many, allows no eviction.

    Their owner has no scale that Kubernetes could read. It then allows none, except by a number
    that has to stay (https://kubernetes.io/docs/tasks/run-application/configure-pdb/).
    """
    number = budget.get("minAvailable")
    return "maxUnavailable" in budget or type(number) is not int or number >= least


@pytest.mark.parametrize(
    ("budget", "least", "expected"),
    [
        ({"minAvailable": 1}, 2, False),
        ({"minAvailable": 1}, 1, True),
        ({"minAvailable": "50%"}, 2, True),
        ({"maxUnavailable": 1}, 2, True),
        ({"maxUnavailable": "50%"}, 2, True),
        ({}, 2, True),
    ],
)
def test_a_budget_that_stops_drains_is_found(
    budget: dict[str, Any], least: int, expected: bool
) -> None:
    assert stops_drains(budget, least) is expected


@pytest.mark.parametrize("target", NAMESPACED)
def test_budgets_let_nodes_be_drained(target: str) -> None:
    least = {
        group["template"]["metadata"]["labels"]["sbi-dist.io/role"]: group.get("minReplicas", 1)
        for resource in resources(target)
        for spec in clusters(resource)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    }
    budgets = {
        each["spec"]["selector"]["matchLabels"]["sbi-dist.io/role"]: each["spec"]
        for each in of_kind(target, "PodDisruptionBudget")
    }
    stopping = [role for role, each in budgets.items() if stops_drains(each, least[role])]
    assert stopping == []
    # A service of several servers never loses all at once.
    assert ("server" in budgets) == (least.get("server", 0) > 1)


def test_priorities_are_in_order() -> None:
    values = {each["metadata"]["name"]: each["value"] for each in of_kind("base", "PriorityClass")}
    order = ["simulator", "trainer", "serving", "head"]
    assert sorted(values, key=values.__getitem__) == [f"sbi-dist-{name}" for name in order]
    by_role = {
        pod["metadata"]["labels"]["sbi-dist.io/role"]: pod["spec"]["priorityClassName"]
        for pod in PODS.values()
    }
    assert by_role["simulator"] == "sbi-dist-simulator"
    assert by_role["server"] == "sbi-dist-serving"
    assert set(by_role.values()) == set(values)
