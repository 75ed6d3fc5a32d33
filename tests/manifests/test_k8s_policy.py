"""The policy linter over the manifests: no finding but those that k8s/policy.yaml explains."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests.pods import pods
from tests.manifests.rendered import K8S, distinct

EXCEPTIONS = yaml.safe_load((K8S / "policy.yaml").read_text())["exceptions"]
# What is wrong with a pod, and the check that says so.
MUTANTS: dict[str, tuple[str, Any]] = {
    "CKV_K8S_16": ("privileged", True),
    "CKV_K8S_20": ("allowPrivilegeEscalation", True),
    "CKV_K8S_22": ("readOnlyRootFilesystem", False),
    "CKV_K8S_37": ("capabilities", {}),
    "CKV_K8S_19": ("hostNetwork", True),
    "CKV_K8S_17": ("hostPID", True),
    "CKV_K8S_38": ("automountServiceAccountToken", True),
    "CKV_K8S_13": ("limits", "memory"),
    "CKV_K8S_11": ("limits", "cpu"),
    "CKV_K8S_14": ("image", "sbi-dist:latest"),
}


def name_of(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def as_pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Itself; or the pods of a resource of Ray's, which the linter does not know."""
    if not resource["apiVersion"].startswith("ray.io/"):
        return [resource]
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name_of(what), "namespace": "sbi-dist", **pod["metadata"]},
            "spec": pod["spec"],
        }
        for what, pod in pods(resource).items()
    ]


def mutant(check: str, pod: dict[str, Any]) -> dict[str, Any]:
    pod = copy.deepcopy(pod)
    pod["metadata"]["name"] = name_of(f"mutant {check}")
    (field, value), container = MUTANTS[check], pod["spec"]["containers"][0]
    if field in container["securityContext"] or field == "privileged":
        container["securityContext"][field] = value
    elif field == "limits":
        del container["resources"]["limits"][value]
    elif field == "image":
        container["image"] = value
    else:
        pod["spec"][field] = value
    return pod


def findings(folder: Path) -> set[tuple[str, str]]:
    """The check and the resource of each, as "Kind name role", of all targets."""
    beside = Path(sys.prefix) / "policy/bin/checkov"
    program = str(beside) if beside.exists() else shutil.which("checkov")
    if program is None:
        reason = "checkov is not installed; make .venv/.policy"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    documents = [each for _, resource in distinct() for each in as_pods(resource)]
    head = next(each for each in documents if each["kind"] == "Pod")
    documents += [mutant(check, head) for check in MUTANTS]
    for number, each in enumerate(documents):
        # JSON, as YAML would have aliases for what is there twice.
        (folder / f"{number:03}.json").write_text(json.dumps(each))
    arguments = ["-d", str(folder), "--framework", "kubernetes", "--skip-download", "-o", "json"]
    done = subprocess.run(
        [program, *arguments, "--compact", "--quiet"], capture_output=True, text=True, timeout=240
    )
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["resource_count"] >= len(documents)
    return {
        # "Pod.sbi-dist.rayjob-sbi-dist-run-head": its kind, namespace and name.
        (each["check_id"], each["resource"].replace(".sbi-dist.", " ", 1))
        for each in report["results"]["failed_checks"]
    }


def is_explained(check: str, where: str) -> bool:
    return any(each["check"] == check and re.fullmatch(each["where"], where) for each in EXCEPTIONS)


def test_no_finding_is_unexplained(tmp_path: Path) -> None:
    # One test, as the linter takes some seconds.
    found = findings(tmp_path)
    missed = {
        check for check in MUTANTS if (check, f"Pod {name_of(f'mutant {check}')}") not in found
    }
    assert missed == set(), "the linter does not find what was made wrong"
    found = {(check, where) for check, where in found if "mutant" not in where}
    assert {each for each in found if not is_explained(*each)} == set()
    for each in EXCEPTIONS:
        assert len(each["reason"]) > 60
        needed = any(
            check == each["check"] and re.fullmatch(each["where"], where) for check, where in found
        )
        assert needed, f"{each['check']} is no finding any more"
