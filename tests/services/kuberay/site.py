"""What Kubernetes does of an overlay: volumes, variables, names, pods of StatefulSets, policies."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.manifests.pods import quantity
from tests.manifests.rendered import Resource
from tests.services.kuberay.api import Api
from tests.services.kuberay.image import Image
from tests.services.kuberay.network import Network
from tests.services.kuberay.operator import NAMESPACE
from tests.services.kuberay.pod import Mount, Pod, Process
from tests.services.kuberay.policies import Peer, flows

__all__ = ["Site"]

Template = dict[str, Any]


class Site:
    """The objects of the overlays, and pods on one machine.

    Args:
        resources: rendered; of those with the same kind and name, one.
        secrets: keys and values by secret, which the manifests leave to their users.
    """

    def __init__(self, resources: list[Resource], secrets: dict[str, dict[str, str]]) -> None:
        self.secrets = secrets
        self.folder = Path(tempfile.mkdtemp(prefix="kuberay-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.objects = {(each["kind"], each["metadata"]["name"]): each for each in resources}
        self.pods: dict[str, tuple[Pod, Template]] = {}
        self._names: dict[str, str] = {}  # of services, by the address
        self.clusters: dict[str, Resource] = {}
        self._api: Api | None = None
        self.network = Network()
        try:
            self.image = Image(self._made("image"), _places(resources))
        except BaseException:
            self.remove()
            raise

    def use(self, api: Api) -> None:
        """Tell pods of the API server; those that begin from now on."""
        self._api = api
        for each in self.all("ServiceAccount"):
            # The operator binds its role to the account of heads that have an autoscaler.
            if each["metadata"]["name"] == "sbi-dist-head":
                api.bind(each["metadata"]["name"])

    def find(self, kind: str, name: str) -> Resource:
        return self.objects[kind, name]

    def all(self, kind: str) -> list[Resource]:
        return [each for (of, _), each in self.objects.items() if of == kind]

    def start_sets(self) -> None:
        """The pods of StatefulSets, with the volumes that they claim, and their services' names."""
        for each in self.all("StatefulSet"):
            name, template = each["metadata"]["name"], each["spec"]["template"]
            for claim in each["spec"].get("volumeClaimTemplates") or ():
                volume = claim["metadata"]["name"]
                source = {"hostPath": {"path": str(self._made(f"claim-{name}-{volume}"))}}
                template["spec"].setdefault("volumes", []).append({"name": volume, **source})
            pod = self.start(f"{name}-0", template)
            lifecycle = template["spec"]["containers"][0].get("lifecycle", {})
            if "postStart" in lifecycle:
                done = pod.execute(lifecycle["postStart"]["exec"]["command"])
                assert done.returncode == 0, done.stderr
            self.name(each["spec"]["serviceName"], pod)

    def start(
        self, name: str, template: Template, namespace: str = NAMESPACE, go: bool = True
    ) -> Pod:
        """Start a pod.

        Args:
            template: its labels and its spec.
            go: whether its containers run, or wait until they are told to.
        """
        metadata = {**template.get("metadata", {}), "name": name, "namespace": namespace}
        template = {"metadata": metadata, "spec": template["spec"]}
        spec = template["spec"]
        pod = Pod(
            name,
            self.image,
            self.network,
            self._made(f"pod-{name}"),
            [self._process(each, template) for each in spec.get("initContainers", ())],
            [self._process(each, template) for each in spec["containers"]],
        )
        self.pods[name] = pod, template
        self._apply_policies()
        if go:
            pod.go()
        return pod

    def described(self) -> list[Template]:
        """The pods, as Kubernetes' API has them."""
        found = []
        for pod, template in list(self.pods.values()):
            state: dict[str, Any] = {"running": {}} if pod.begun else {"waiting": {}}
            if pod.code is not None:
                state = {"terminated": {"exitCode": pod.code}}
            names = [each.get("name", "main") for each in template["spec"]["containers"]]
            status = {
                "phase": "Running" if pod.begun else "Pending",
                "podIP": pod.address,
                "containerStatuses": [{"name": names[0], "state": state}],
            }
            metadata = {**template["metadata"], "resourceVersion": "1"}
            found.append({"metadata": metadata, "spec": template["spec"], "status": status})
        return found

    def delete(self, pod: Pod) -> None:
        """End a pod at once. Its volumes go with it, but for those that were claimed."""
        pod.kill()
        self.pods.pop(pod.name, None)
        shutil.rmtree(self.folder / f"pod-{pod.name}", ignore_errors=True)
        for name in [each for each, address in self._names.items() if address == pod.address]:
            del self._names[name]

    def name(self, service: str, pod: Pod) -> None:
        """Let a service's name lead to a pod."""
        domain = f"{service}.{NAMESPACE}.svc"
        for each in (service, domain, f"{domain}.cluster.local"):
            self._names[each] = pod.address
        self.image.write_hosts(self._names)

    def denied(self) -> list[tuple[str, str, int]]:
        """Connections that the policies have refused, by the names of pods."""
        return self.network.denied({pod.address: name for name, (pod, _) in self.pods.items()})

    def remove(self) -> None:
        """End all pods and remove all files."""
        for pod, _ in self.pods.values():
            pod.kill()
        self.network.remove()
        for _ in range(50):  # mounts go a moment after the last process
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)

    def _apply_policies(self) -> None:
        peers = [
            Peer(pod.address, template["metadata"]["namespace"], template["metadata"]["labels"])
            for pod, template in self.pods.values()
        ]
        self.network.allow(sorted(flows(self.all("NetworkPolicy"), peers), key=str))

    def _process(self, container: dict[str, Any], template: Template) -> Process:
        spec = template["spec"]
        variables = {**self.image.environment, **(self._api.environment if self._api else {})}
        for each in container.get("envFrom", ()):
            if "configMapRef" in each:
                variables |= self.objects["ConfigMap", each["configMapRef"]["name"]]["data"]
            else:
                reference = each["secretRef"]
                assert reference["name"] in self.secrets or reference.get("optional"), each
                variables |= self.secrets.get(reference["name"], {})
        for each in container.get("env", ()):
            source = each.get("valueFrom")
            if source is None:
                variables[each["name"]] = each.get("value", "")
            elif "secretKeyRef" in source:
                reference = source["secretKeyRef"]
                variables[each["name"]] = self.secrets[reference["name"]][reference["key"]]
            else:
                found = _field(template["metadata"], source["fieldRef"]["fieldPath"])
                variables[each["name"]] = found
        command = [*container.get("command", ()), *container.get("args", ())]
        # Kubernetes' own form of variables in commands.
        command = [
            re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], each) for each in command
        ]
        security = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
        user = security.get("runAsUser", 1000), security.get("runAsGroup", 1000)
        return Process(command, variables, user, self._mounts(container, template, user))

    def _mounts(
        self, container: dict[str, Any], template: Template, user: tuple[int, int]
    ) -> list[Mount]:
        name, spec = template["metadata"]["name"], template["spec"]
        volumes = {each["name"]: each for each in spec.get("volumes", ())}
        found = []
        for each in container.get("volumeMounts", ()):
            volume, path = volumes[each["name"]], each["mountPath"]
            empty = volume.get("emptyDir")
            if empty is not None and empty.get("medium") == "Memory":
                size = empty.get("sizeLimit")
                found.append(Mount(path, None, str(int(quantity(size))) if size else ""))
                continue
            source = self._source(name, volume, spec)
            if "subPath" in each:
                source = source / each["subPath"]
                source.mkdir(exist_ok=True)
            if empty is not None or "hostPath" in volume:
                source.chmod(0o2777)
                shutil.chown(source, *user)
            found.append(Mount(path, source, read_only=each.get("readOnly", False)))
        return found

    def _source(self, pod: str, volume: dict[str, Any], spec: dict[str, Any]) -> Path:
        """The folder of this machine that a volume is."""
        if "hostPath" in volume:  # a claim
            return Path(volume["hostPath"]["path"])
        folder = self._made(f"pod-{pod}") / f"volume-{volume['name']}"
        folder.mkdir(exist_ok=True)
        files: dict[str, str] = {}
        if "configMap" in volume:
            files = self.objects["ConfigMap", volume["configMap"]["name"]]["data"]
        elif "secret" in volume:
            secret = volume["secret"]
            assert secret["secretName"] in self.secrets or secret.get("optional"), volume
            files = self.secrets.get(secret["secretName"], {})
        elif "projected" in volume:
            files = self._identity(spec["serviceAccountName"])
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    def _identity(self, account: str) -> dict[str, str]:
        """What Kubernetes projects of a service account and of its certificate."""
        assert self._api is not None
        token, certificate = self._api.token(account), self._api.certificate
        return {"token": token, "ca.crt": certificate, "namespace": NAMESPACE}

    def _made(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name


def _field(metadata: dict[str, Any], path: str) -> str:
    """What the downward API gives of a pod."""
    if label := re.fullmatch(r"metadata\.labels\['(.+)'\]", path):
        return metadata["labels"][label[1]]
    return metadata[path.removeprefix("metadata.")]


def _places(value: Any) -> set[str]:
    """Where anything mounts its volumes, below all that was rendered."""
    if isinstance(value, list):
        return {place for each in value for place in _places(each)}
    if not isinstance(value, dict):
        return set()
    own = {value["mountPath"]} if "mountPath" in value else set()
    return own | {place for each in value.values() for place in _places(each)}
