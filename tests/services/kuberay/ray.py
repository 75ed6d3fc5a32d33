"""What KubeRay's operator does with a Ray cluster, a job and a service, beside making their pods.

Of ray-operator/controllers/ray, v1.7.0: raycluster_controller.go, rayjob_controller.go and
rayservice_controller.go.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable
from typing import Any

import httpx
import yaml

from tests.manifests.pods import clusters
from tests.manifests.rendered import Resource
from tests.services.kuberay.network import inside
from tests.services.kuberay.operator import NAMESPACE, ray_pods, submitter
from tests.services.kuberay.pod import Pod
from tests.services.kuberay.site import Site

__all__ = ["Cluster", "Job", "Service", "wait_for"]

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # of k8s.io/apimachinery/pkg/util/rand


def generated(prefix: str) -> str:
    """A name that there was not before, as Kubernetes makes them."""
    return f"{prefix}-{''.join(random.SystemRandom().choices(_LETTERS, k=5))}"


class Cluster:
    """The Ray cluster of a RayCluster, RayJob or RayService.

    Args:
        operator: a pod in whose network the operator is.
    """

    def __init__(self, site: Site, resource: Resource, operator: Pod) -> None:
        self._site, self._operator = site, operator
        named = resource["metadata"]["name"]
        self.name = named if resource["kind"] == "RayCluster" else generated(named)
        self.token = secrets.token_hex(32)
        # reconcileAuthSecret
        site.secrets[self.name] = {"auth_token": self.token}
        self._templates = ray_pods(resource, self.name)
        (self._spec,) = clusters(resource)
        site.clusters[self.name] = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": self.name, "namespace": NAMESPACE, "resourceVersion": "1"},
            "spec": self._spec,
        }
        self._pods: dict[str, list[Pod]] = {role: [] for role in self._templates}
        self.ended: dict[str, str] = {}  # what pods said, that have ended

    @property
    def head(self) -> Pod:
        return self._pods["head"][0]

    def workers(self, group: str) -> list[Pod]:
        return self._pods[group]

    def reconcile(self) -> None:
        """reconcilePods: a pod that has ended is replaced, as restartPolicy is Never."""
        for role, pods in self._pods.items():
            unwanted = self._unwanted(role)
            for pod in [each for each in pods if each.code is not None or each.name in unwanted]:
                self.ended[pod.name] = pod.said()
                self._site.delete(pod)
                pods.remove(pod)
            while len(pods) < self._wanted(role):
                kind = "head" if role == "head" else f"{role}-worker"
                name = generated(f"{self.name}-{kind}")
                pods.append(self._site.start(name, self._templates[role], go=role == "head"))
                if role == "head":
                    self._site.name(f"{self.name}-head-svc", pods[-1])
        # Workers wait for their head. In Kubernetes their init containers do: with fewer CPUs it
        # is quicker when these begin later.
        waiting = [pod for pods in self._pods.values() for pod in pods if not pod.told]
        if waiting and self.ready(self.head):
            for pod in waiting:
                pod.go()

    def _group(self, name: str) -> dict[str, Any]:
        (found,) = [each for each in self._spec["workerGroupSpecs"] if each["groupName"] == name]
        return found

    def _wanted(self, role: str) -> int:
        """GetWorkerGroupDesiredReplicas; the autoscaler changes them."""
        if role == "head":
            return 1
        group = self._group(role)
        return min(max(group["replicas"], group["minReplicas"]), group["maxReplicas"])

    def _unwanted(self, role: str) -> list[str]:
        """Pods that the autoscaler wants deleted."""
        strategy = {} if role == "head" else self._group(role).get("scaleStrategy") or {}
        return strategy.get("workersToDelete") or []

    def ready(self, pod: Pod) -> bool:
        """What the kubelet finds out by the readiness probe of a pod's container."""
        _, template = self._site.pods[pod.name]
        probe = template["spec"]["containers"][0]["readinessProbe"]
        if pod.code is not None or not pod.begun:
            return False
        if "exec" in probe:
            return pod.execute(probe["exec"]["command"]).returncode == 0
        url = f"http://{pod.address}:{probe['httpGet']['port']}{probe['httpGet']['path']}"

        def ask() -> bool:
            try:
                return httpx.get(url, timeout=5).status_code < 400
            except httpx.TransportError:
                return False

        return inside(pod.pid, ask)

    def all_ready(self) -> bool:
        """Whether RayCluster.status.state is ready."""
        self.reconcile()
        pods = [pod for role in self._pods.values() for pod in role]
        return len(pods) == sum(map(self._wanted, self._pods)) and all(map(self.ready, pods))

    def dashboard(self, method: str, path: str, **more: Any) -> httpx.Response | None:
        """Ask the dashboard, as the operator does; None where it does not answer."""
        headers = {"x-ray-authorization": f"Bearer {self.token}"}
        url = f"http://{self.head.address}:8265{path}"

        def ask() -> httpx.Response | None:
            try:
                return httpx.request(method, url, headers=headers, timeout=10, **more)
            except httpx.TransportError:
                return None

        return inside(self._operator.pid, ask)

    def delete(self) -> None:
        for pods in self._pods.values():
            for pod in pods:
                self._site.delete(pod)
            pods.clear()
        del self._site.clusters[self.name]


class Job:
    """A RayJob: its cluster, and the job of Kubernetes that submits it."""

    def __init__(self, site: Site, resource: Resource, operator: Pod) -> None:
        self._site, self._resource = site, resource
        self.cluster = Cluster(site, resource, operator)
        self.id = generated(resource["metadata"]["name"])
        self.submitters: list[Pod] = []

    def submit(self) -> None:
        """createNewK8sJob, once the cluster is ready."""
        template = submitter(self._resource, self.cluster.name, self.id)
        name = generated(self._resource["metadata"]["name"])
        self.submitters.append(self._site.start(name, template))

    def status(self) -> str | None:
        """Of Ray's job, or None where it is not known; replaces what has ended meanwhile."""
        self.cluster.reconcile()
        if self.submitters[-1].code and not self._given_up():
            self.submit()
        answer = self.cluster.dashboard("GET", f"/api/jobs/{self.id}")
        return answer.json()["status"] if answer is not None and answer.is_success else None

    def finished(self) -> bool:
        """Whether RayJob.status.jobDeploymentStatus is Complete.

        Raises:
            AssertionError: it is Failed.
        """
        status, code = self.status(), self.submitters[-1].code
        # A submitter that has ended just now is replaced when it is looked at again.
        failed = status in ("FAILED", "STOPPED") or (bool(code) and self._given_up())
        assert not failed, f"{status}, submitter {code}: {self.submitters[-1].said()[-3000:]}"
        return status == "SUCCEEDED" and code == 0

    def _given_up(self) -> bool:
        return len(self.submitters) > self._resource["spec"]["submitterConfig"]["backoffLimit"]


class Service:
    """A RayService: its cluster, and the applications that are sent to it."""

    def __init__(self, site: Site, resource: Resource, operator: Pod) -> None:
        self._site, self._resource = site, resource
        self.cluster = Cluster(site, resource, operator)
        self._sent = False

    def reconcile(self) -> bool:
        """reconcileServe; whether all applications run and requests have a pod to go to."""
        self.cluster.reconcile()
        if not self.cluster.ready(self.cluster.head):
            return False
        path = "/api/serve/applications/"
        answer = self.cluster.dashboard("GET", path, params={"api_type": "declarative"})
        if answer is None or not answer.is_success:
            return False
        applications = answer.json()["applications"]
        # checkIfNeedSubmitServeApplications
        if not self._sent or not applications:
            configuration = yaml.safe_load(self._resource["spec"]["serveConfigV2"])
            answer = self.cluster.dashboard("PUT", path, json=configuration)
            self._sent = answer is not None and answer.is_success
            return False
        # BuildServeService: workers whose proxy is ready; excludeHeadPodFromServeSvc.
        servers = [each for each in self.cluster.workers("server") if self.cluster.ready(each)]
        if servers:
            self._site.name(f"{self._resource['metadata']['name']}-serve-svc", servers[0])
        running = all(each["status"] == "RUNNING" for each in applications.values())
        return running and bool(servers)


def wait_for(condition: Callable[[], bool], patience_s: float, what: str) -> float:
    """Wait until something is so; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + patience_s, f"not within {patience_s:g} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - began
