"""The cluster launcher's file, as Ray reads it, as AWS would, and as the autoscaler acts on it."""

from __future__ import annotations

import copy
import functools
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.resource_demand_scheduler import (
    _default_utilization_scorer,
    get_nodes_for,
)
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster/ray/cluster.yaml"
WRITTEN = yaml.safe_load(FILE.read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
Change = Callable[[dict[str, Any]], object]


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As ``ray up`` has it, with Ray's defaults for AWS, before it asks AWS for anything."""
    return prepare_config(copy.deepcopy(config))


def changed(change: Change) -> dict[str, Any]:
    config = copy.deepcopy(WRITTEN)
    change(config)
    return config


def test_ray_accepts_it() -> None:
    config = prepared(WRITTEN)
    validate_config(config)
    assert set(config["available_node_types"]) == {"head", "simulator", "trainer"}


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(max_worker=3),
        lambda config: config.update(max_workers="3"),
        lambda config: config.update(upscaling_speed=-1),
        lambda config: config.update(head_node_type="heads"),
        lambda config: config.pop("provider"),
        lambda config: config["provider"].pop("type"),
        lambda config: config["docker"].update(images="x"),
        lambda config: config["docker"].update(run_options="--x"),
        lambda config: config["auth"].update(user="x"),
        lambda config: config["available_node_types"]["trainer"].pop("node_config"),
        lambda config: config["available_node_types"]["trainer"].pop("resources"),
        lambda config: config["available_node_types"]["trainer"].update(max_worker=1),
        lambda config: config["available_node_types"]["trainer"]["resources"].update(GPU=0.5),
        lambda config: config["available_node_types"]["trainer"]["docker"].update(image="x"),
        lambda config: config["available_node_types"]["trainer"].update(min_workers=21),
        lambda config: config.update(head_start_ray_commands="ray start"),
    ],
)
def test_ray_refuses_mistakes_in_it(change: Change) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate_config(prepared(changed(change)))


@functools.cache
def _instances() -> Any:
    """What AWS' own description says of a request for machines."""
    service = ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")
    return service.operation_model("RunInstances").input_shape


def mistakes(node_config: dict[str, Any]) -> str:
    """What AWS would refuse in a request with these fields: names, types and enumerations."""
    # Ray adds how many machines it wants.
    shape, request = _instances(), {"MinCount": 1, "MaxCount": 1, **node_config}
    found = ParamValidator().validate(request, shape).generate_report()

    def enumerated(shape: Any, value: Any, path: str) -> list[str]:
        if shape.type_name == "structure" and isinstance(value, dict):
            known = shape.members.items()
            return [
                line
                for name, member in known
                if name in value
                for line in enumerated(member, value[name], f"{path}.{name}")
            ]
        if shape.type_name == "list" and isinstance(value, list):
            return [line for each in value for line in enumerated(shape.member, each, path)]
        if getattr(shape, "enum", None) and value not in shape.enum:
            return [f"{path}: {value!r} is none of the {len(shape.enum)} allowed"]
        return []

    return "\n".join([found, *enumerated(shape, request, "")]).strip()


@pytest.mark.parametrize("name", ["head", "simulator", "trainer"])
def test_aws_knows_every_field_of_a_machine(name: str) -> None:
    assert mistakes(WRITTEN["available_node_types"][name]["node_config"]) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"InstanceTyp": "c7i.4xlarge"}, "InstanceTyp"),
        ({"InstanceType": "c7i.5xlarge"}, "c7i.5xlarge"),
        ({"InstanceMarketOptions": {"MarketType": "cheap"}}, "cheap"),
        ({"MetadataOptions": {"HttpTokens": True}}, "HttpTokens"),
        ({"BlockDeviceMappings": [{"Ebs": {"VolumeSize": "200"}}]}, "VolumeSize"),
        ({"IamInstanceProfile": "arn:aws:iam::1:instance-profile/x"}, "IamInstanceProfile"),
    ],
)
def test_aws_refuses_mistakes_in_a_machine(change: dict[str, Any], said: str) -> None:
    node = {**WRITTEN["available_node_types"]["simulator"]["node_config"], **change}
    assert said in mistakes(node)


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        ([{"CPU": 1}] * 40, {"simulator": 3}),
        ([{"CPU": 16}] * 20, {"simulator": 16}),  # never a trainer for a simulation
        ([{"GPU": 1, "CPU": 1}] * 2, {"trainer": 2}),
        ([{"GPU": 1}], {"trainer": 1}),
        ([{"GPU": 1}] * 9, {"trainer": 4}),
        ([{"CPU": 1}] * 16 + [{"GPU": 1, "CPU": 8}], {"simulator": 1, "trainer": 1}),
        ([{"CPU": 64}], {}),
    ],
)
def test_demand_brings_the_machines_that_are_for_it(
    demand: list[dict[str, float]], expected: dict[str, int]
) -> None:
    config = prepared(WRITTEN)
    found, _ = get_nodes_for(
        config["available_node_types"],
        existing_nodes={"head": 1},
        head_node_type="head",
        max_to_add=config["max_workers"],
        resources=sorted(demand, key=lambda each: -each.get("GPU", 0)),
        utilization_scorer=functools.partial(
            _default_utilization_scorer, node_availability_summary=None
        ),
    )
    assert {name: count for name, count in found.items() if count} == expected


def test_only_workers_may_be_taken_away() -> None:
    types = WRITTEN["available_node_types"]
    spot = {
        name: types[name]["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name in types
    }
    assert spot == {"head": None, "simulator": "spot", "trainer": "spot"}
    # A stopped spot machine can't be started again.
    assert WRITTEN["provider"]["cache_stopped_nodes"] is False


def test_no_one_else_gets_in() -> None:
    config = prepared(WRITTEN)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    # The token goes where the image's user has it, and nothing else is carried there.
    assert config["file_mounts"] == {"/home/sbi/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in FILE.read_text()
    for node in WRITTEN["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(each["Ebs"]["Encrypted"] for each in node["node_config"]["BlockDeviceMappings"])
    roles = {
        name: node["node_config"]["IamInstanceProfile"]["Arn"]
        for name, node in WRITTEN["available_node_types"].items()
    }
    assert roles["head"] not in (roles["simulator"], roles["trainer"])
    assert not re.search(r"AKIA[0-9A-Z]{16}|secret_?access", FILE.read_text(), re.IGNORECASE)


def test_it_runs_the_image_as_it_is() -> None:
    config = prepared(WRITTEN)
    images = [config["docker"]["image"]]
    images.append(config["available_node_types"]["trainer"]["docker"]["worker_image"])
    assert [image.rpartition(":")[2] for image in images] == [VERSION, f"{VERSION}-cuda"]
    # Ray's defaults for AWS would install its own packages into it.
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[commands] == []
    options = config["docker"]["run_options"]
    command = docker_start_cmds(
        "ubuntu", images[0], {}, "sbi-dist", options, "c", "/home/sbi", "docker"
    )
    given = shlex.split(command)
    assert given[-2:] == [images[0], "bash"] and given.count("--ulimit") == 1
    assert "RAY_AUTH_MODE=token" in given and "AWS_DEFAULT_REGION=us-west-2" in given
    region = config["provider"]["region"]
    assert f"AWS_DEFAULT_REGION={region}" in given
    zones = config["provider"]["availability_zone"].split(",")
    assert all(zone.startswith(region) for zone in zones)
