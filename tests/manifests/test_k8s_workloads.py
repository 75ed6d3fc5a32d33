"""What jobs and the service run: that it exists, and fits into the pods that it is to run in."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from sbi_dist.experiment import Experiment, load_experiment
from sbi_dist.serving.command import environment
from sbi_dist.serving.deployment import build
from tests.manifests.pods import clusters, pods, quantity
from tests.manifests.rendered import K8S, Resource, distinct, find, identity, of_kind, resources
from tests.monitoring import DASHBOARDS, RULES

SIZES = ("local", "cpu", "gpu")
MONITORING = K8S / "components/monitoring"
STAGES = ("run", "simulate", "train", "calibrate", "infer", "report")


def experiment(target: str, folder: Path) -> Experiment:
    """The one that the pods of a target have in a ConfigMap."""
    (found,) = [
        each["data"]
        for each in of_kind(target, "ConfigMap")
        if each["metadata"]["name"].startswith("sbi-dist-experiment")
    ]
    for name, text in found.items():
        (folder / name).write_text(text)
    return load_experiment(str(folder / "experiment.yaml"))[0]


def room(group: dict[str, Any], name: str) -> float:
    """What Ray is told that a pod of a group has."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return quantity(limits.get(name, 0))


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["groupName"]: each for each in spec["workerGroupSpecs"]}


# ---- jobs ----


@pytest.mark.parametrize(
    "target", [*(f"overlays/{size}/jobs" for size in SIZES), "overlays/kueue/jobs"]
)
def test_jobs_run_their_stage(target: str, tmp_path: Path) -> None:
    loaded = experiment(target, tmp_path)
    assert loaded.store.startswith("s3://")
    jobs = {
        each["metadata"]["labels"]["sbi-dist.io/stage"]: each for each in of_kind(target, "RayJob")
    }
    assert jobs.keys() == set(STAGES)
    for stage, job in jobs.items():
        spec = job["spec"]
        assert job["metadata"]["name"] == f"sbi-dist-{stage}"
        program, command, file = spec["entrypoint"].split()
        assert (program, command, file) == ("sbi-dist", stage, "/etc/sbi_dist/experiment.yaml")
        # `sbi-dist jobs list` shows what has a version. The experiment may get another name.
        version = metadata.version("sbi_dist")
        assert spec["metadata"] == {"sbi_dist": version, "stage": stage}
        # What is finished is in the store: the cluster may go, and the job be repeated.
        assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
        assert spec["activeDeadlineSeconds"] > 0 and spec["submissionMode"] == "K8sJobMode"
        assert spec["backoffLimit"] == (0 if stage == "calibrate" else 2)
        assert "gcsFaultToleranceOptions" not in spec["rayClusterSpec"]
        images = {
            each["image"] for pod in (spec["submitterPodTemplate"],
                                      spec["rayClusterSpec"]["headGroupSpec"]["template"])
            for each in pod["spec"]["containers"]
        }  # fmt: skip
        (image,) = images
        assert image.endswith(f"sbi-dist:{version}")


# What the kustomizations of the jobs say to apply before them.
BEFORE = {
    **{f"overlays/{size}/jobs": [f"overlays/{size}/cluster"] for size in SIZES},
    "overlays/kueue/jobs": ["overlays/gpu/cluster", "overlays/kueue/queues"],
}


def applied(target: str, stage: str) -> list[Resource]:
    """What the command of a target's kustomization takes, for a stage in place of `run`."""
    text = (K8S / target / "kustomization.yaml").read_text()
    ((key, values),) = re.findall(rf"kubectl apply -k k8s/{target} -l '(\S+) in \(([^)]+)\)'", text)
    among = {stage if each == "run" else each for each in values.split(", ")}
    return [
        each for each in resources(target) if each["metadata"].get("labels", {}).get(key) in among
    ]


def needs(resource: Resource) -> set[str]:
    """Other resources that it names, as "Kind name"."""
    found = set()
    for pod in pods(resource).values():
        spec = pod["spec"]
        found |= {f"ServiceAccount {spec['serviceAccountName']}"}
        found |= {f"PriorityClass {spec['priorityClassName']}"}
        maps = re.findall(r"'configMap(?:Ref)?': {[^{}]*'name': '([^']+)'", str(spec))
        found |= {f"ConfigMap {name}" for name in maps if name != "kube-root-ca.crt"}
    labels = resource["metadata"].get("labels", {})
    for key, kind in (("queue-name", "LocalQueue"), ("priority-class", "WorkloadPriorityClass")):
        if f"kueue.x-k8s.io/{key}" in labels:
            found.add(f"{kind} {labels[f'kueue.x-k8s.io/{key}']}")
    if resource["kind"] == "LocalQueue":
        found.add(f"ClusterQueue {resource['spec']['clusterQueue']}")
    return found


@pytest.mark.parametrize("target", BEFORE)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_applied_for_a_job_is_all_that_it_needs(target: str, stage: str) -> None:
    taken = applied(target, stage)
    assert [identity(each) for each in taken if each["kind"] == "RayJob"] == [
        f"RayJob sbi-dist-{stage}"
    ]
    # ConfigMaps have other names there before a change.
    there = {
        identity(each)
        for before in BEFORE[target]
        for each in resources(before)
        if each["kind"] != "ConfigMap"
    }
    there |= {identity(each) for each in taken}
    assert {name for each in taken for name in needs(each)} <= there
    kinds = {each["kind"] for each in taken} - {"LocalQueue"}
    assert kinds == {"RayJob", "ConfigMap"}  # and no cluster


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_commands(stage: str) -> None:
    command = [sys.executable, "-m", "sbi_dist", stage, "--help"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("size", SIZES)
def test_stages_find_room_when_they_begin(size: str, tmp_path: Path) -> None:
    """Of the least pods there are, so that they begin without waiting for the autoscaler."""
    options = experiment(f"overlays/{size}/jobs", tmp_path)
    for job in of_kind(f"overlays/{size}/jobs", "RayJob"):
        stage, spec = job["metadata"]["labels"]["sbi-dist.io/stage"], job["spec"]["rayClusterSpec"]
        by_name = groups(spec)
        wanted: list[tuple[str, float]] = []
        added: list[tuple[str, float]] = []  # of a run, when it comes to them
        if stage in ("run", "train"):
            training = [("cpu", options.train.cpus_per_worker or 1)]
            training += [("nvidia.com/gpu", options.train.gpus_per_worker or 0)]
            (added if stage == "run" else wanted).extend(training)
        if stage in ("run", "infer"):
            drawing = [("cpu", options.infer.cpus_per_actor)]
            drawing += [("nvidia.com/gpu", options.infer.gpus_per_actor)]
            (added if stage == "run" else wanted).extend(drawing)
        if stage == "calibrate":
            wanted += [("cpu", options.calibrate.cpus_per_actor)]
        if stage in ("run", "simulate"):
            assert by_name["simulator"]["minReplicas"] >= 1
            assert room(by_name["simulator"], "cpu") >= options.simulate.cpus_per_actor
        for name, amount in wanted:
            assert any(
                each["minReplicas"] >= 1 and room(each, name) >= amount for each in by_name.values()
            ) or not amount, (stage, name)  # fmt: skip
        for name, amount in added:
            assert any(
                each["maxReplicas"] >= 1 and room(each, name) >= amount for each in by_name.values()
            ) or not amount, (stage, name)  # fmt: skip
        if stage in ("run", "train"):
            assert by_name["trainer"]["minReplicas"] == (stage == "train")
            gpus = room(by_name["trainer"], "nvidia.com/gpu")
            assert gpus == (1 if size == "gpu" else 0) == (options.train.gpus_per_worker or 0)
        # The control plane has no CPUs to schedule on.
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


# Of kind's control plane with CoreDNS and its network, and KubeRay's operator: 950m and 100m CPU,
# 290Mi and 512Mi of memory.
OTHERS = {"cpu": 1.05, "memory": 802 * 2**20}


def requested(resource: Resource, name: str) -> float:
    """What its pods ask for at least, with the submitter of a job."""
    size = {"head": 1.0, "submitter": 1.0, "pod": float(resource["spec"].get("replicas", 1))}
    for spec in clusters(resource):
        size |= {group: float(each["minReplicas"]) for group, each in groups(spec).items()}
    return sum(
        size.get(what.rpartition(" ")[2], 0.0)  # not of the job that cleans Redis at the end
        * quantity(each["resources"]["requests"][name])
        for what, pod in pods(resource).items()
        for each in pod["spec"]["containers"]
    )


def test_one_machine_holds_the_local_overlay() -> None:
    text = (K8S / "overlays/local/cluster/kustomization.yaml").read_text()
    ((cpus, gigabytes),) = re.findall(r"(\d+) CPUs and (\d+) GB", text)
    machine = {"cpu": int(cpus), "memory": int(gigabytes) * 1e9}
    kinds = ("RayCluster", "StatefulSet")
    for name, there in machine.items():
        standing = sum(requested(each, name) for each in of_kind("overlays/local/cluster", *kinds))
        (service,) = of_kind("overlays/local/service", "RayService")
        for beside in (*of_kind("overlays/local/jobs", "RayJob"), service):
            most = OTHERS[name] + standing + requested(beside, name)
            assert most <= there, (identity(beside), name, most)
    # As many as the README says.
    assert f"{cpus} CPUs and {gigabytes} GB" in (K8S.parent / "README.md").read_text()


@pytest.mark.parametrize(
    "target", ["overlays/cpu/jobs", "overlays/gpu/jobs", "overlays/kueue/jobs"]
)
def test_training_does_not_fit_a_simulator(target: str, tmp_path: Path) -> None:
    """Which may be on a spot machine, and Ray goes by room alone."""
    options = experiment(target, tmp_path).train
    asked = {"cpu": options.cpus_per_worker or 1, "nvidia.com/gpu": options.gpus_per_worker or 0}
    # One for each GPU, where the number of workers is left to what the cluster has.
    if target == "overlays/kueue/jobs":
        assert (options.workers, options.gpus_per_worker) == ("auto", None)
        asked["nvidia.com/gpu"] = 1
    for resource in of_kind(target, "RayCluster", "RayJob"):
        for spec in clusters(resource):
            simulator = groups(spec)["simulator"]
            assert any(room(simulator, name) < amount for name, amount in asked.items())


def test_groups_scale_between_their_bounds() -> None:
    for _, resource in distinct():
        for spec in clusters(resource):
            autoscaled = spec["enableInTreeAutoscaling"]
            assert autoscaled != (
                "kueue.x-k8s.io/queue-name" in resource["metadata"].get("labels", {})
            )
            if autoscaled:
                assert spec["autoscalerOptions"]["version"] == "v2"
            for name, each in groups(spec).items():
                assert each["minReplicas"] == each["replicas"] <= each["maxReplicas"], name
                spot = "spot" in str(each["template"]["spec"].get("tolerations"))
                assert spot == (name == "simulator")


def test_kueue_has_room_for_each_job() -> None:
    (queue,) = of_kind("overlays/kueue/queues", "ClusterQueue")
    (local,) = of_kind("overlays/kueue/jobs", "LocalQueue")
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (covered,) = queue["spec"]["resourceGroups"]
    flavors = {
        each["metadata"]["name"] for each in of_kind("overlays/kueue/queues", "ResourceFlavor")
    }
    assert {each["name"] for each in covered["flavors"]} == flavors
    quota = {
        (flavor["name"].rpartition("-")[2], each["name"]): quantity(each["nominalQuota"])
        for flavor in covered["flavors"]
        for each in flavor["resources"]
    }
    for job in of_kind("overlays/kueue/jobs", "RayJob"):
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
        spec = job["spec"]["rayClusterSpec"]
        need: dict[tuple[str, str], float] = {}
        for times, pod in [
            (1, spec["headGroupSpec"]["template"]),
            (1, job["spec"]["submitterPodTemplate"]),
            *((each["replicas"], each["template"]) for each in spec["workerGroupSpecs"]),
        ]:
            requests = pod["spec"]["containers"][0]["resources"]["requests"]
            # What no quota covers, no job may ask for.
            assert requests.keys() <= set(covered["coveredResources"])
            flavor = "gpu" if "nvidia.com/gpu" in requests else "cpu"
            for name, amount in requests.items():
                need[flavor, name] = need.get((flavor, name), 0) + times * quantity(amount)
        assert all(amount <= quota[key] for key, amount in need.items()), identity(job)


# ---- the service ----


@pytest.mark.parametrize("size", SIZES)
def test_the_service_is_what_serve_takes(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = find(f"overlays/{size}/service", "RayService", "sbi-dist")
    config = yaml.safe_load(resource["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8000)
    loaded = experiment(f"overlays/{size}/service", tmp_path)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    arguments = {**application.args, "experiment": str(tmp_path / "experiment.yaml")}
    _, name, options = build(arguments)._bound_deployment.init_args
    assert (name, options) == (loaded.name, loaded.serve)
    assert resource["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    # Requests that the former cluster has are finished before it goes.
    assert resource["spec"]["rayClusterDeletionDelaySeconds"] > options.max_timeout_s


@pytest.mark.parametrize("size", SIZES)
def test_replicas_fit(size: str, tmp_path: Path) -> None:
    options = experiment(f"overlays/{size}/service", tmp_path).serve
    spec = find(f"overlays/{size}/service", "RayService", "sbi-dist")["spec"]["rayClusterConfig"]
    (server,) = spec["workerGroupSpecs"]
    assert server["groupName"] == "server" and "gcsFaultToleranceOptions" in spec
    each = room(server, "cpu") // options.cpus_per_replica
    if options.gpus_per_replica:
        each = min(each, room(server, "nvidia.com/gpu") // options.gpus_per_replica)
    most = options.max_replicas or options.min_replicas
    assert server["minReplicas"] * each >= options.min_replicas
    assert server["maxReplicas"] * each >= most
    # Models and requests of each replica on a pod, torch, and Ray's own processes.
    replica_mb = options.models_memory_mb + options.request_memory_mb + 600
    assert room(server, "memory") > (replica_mb * min(each, most) + 800) * 1e6
    if options.tokens_file is not None:
        (mount,) = [
            mount
            for mount in server["template"]["spec"]["containers"][0]["volumeMounts"]
            if mount["name"] == "tokens"
        ]
        assert Path(options.tokens_file).parent == Path(mount["mountPath"])
    assert (options.tokens_file is None) == (size == "local")


@pytest.mark.parametrize("size", SIZES)
def test_the_proxy_is_set_as_by_the_command(size: str, tmp_path: Path) -> None:
    options = experiment(f"overlays/{size}/service", tmp_path).serve
    spec = find(f"overlays/{size}/service", "RayService", "sbi-dist")["spec"]["rayClusterConfig"]
    expected = environment(options, tmp_path)
    # On a machine of many services these have to differ; in a pod the usual ones are free.
    own = {name for name in expected if name.endswith("_PORT") or str(tmp_path) in expected[name]}
    own.add("RAY_SERVE_HAPROXY_NBTHREAD")
    for pod in (spec["headGroupSpec"], spec["workerGroupSpecs"][0]):
        variables = {
            each["name"]: each["value"] for each in pod["template"]["spec"]["containers"][0]["env"]
        }
        assert {name: value for name, value in variables.items() if name.startswith("RAY_")} == {
            name: value for name, value in expected.items() if name not in own
        }


# ---- monitoring ----


def test_rules_are_those_of_prometheus(tmp_path: Path) -> None:
    build_py = [sys.executable, "-B", str(MONITORING / "build.py"), str(tmp_path / "rules.yaml")]
    subprocess.run(build_py, check=True, timeout=60)
    written, made = (MONITORING / "rules.yaml").read_text(), (tmp_path / "rules.yaml").read_text()
    assert written == made, "run python k8s/components/monitoring/build.py"
    (rule,) = of_kind("overlays/cpu/cluster", "PrometheusRule")
    source = [yaml.safe_load(path.read_text()) for path in sorted(RULES.glob("*.yml"))]
    assert [rule["spec"]] == source


def test_dashboards_are_those_of_grafana() -> None:
    (dashboards,) = [
        each
        for each in of_kind("overlays/cpu/cluster", "ConfigMap")
        if each["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
    ]
    assert dashboards["data"] == {path.name: path.read_text() for path in DASHBOARDS.iterdir()}
    # `kubectl apply` keeps all of it in an annotation, which may have that much.
    assert sum(map(len, dashboards["data"].values())) < 200 * 1024


def test_the_monitor_finds_the_ports() -> None:
    (monitor,) = of_kind("overlays/cpu/cluster", "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    # Prometheus' operator names the job after namespace and monitor otherwise.
    assert {"targetLabel": "job", "replacement": "ray"} in endpoint["relabelings"]
    assert "jobLabel" not in monitor["spec"]
    for resource in resources("overlays/cpu/service"):
        for spec in clusters(resource):
            for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
                ports = group["template"]["spec"]["containers"][0]["ports"]
                assert {"name": endpoint["port"], "containerPort": 8080} in ports
