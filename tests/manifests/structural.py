"""Resources checked against a CustomResourceDefinition as strictly as the API server can.

Unknown fields are findings: the API server drops them with a warning, or refuses them where it is
asked for strict validation. Source: "Extend the Kubernetes API with CustomResourceDefinitions",
sections on structural schemas, pruning, and validation rules
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from cel_expr_python import cel

__all__ = ["Schemas", "check"]

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}
_RANGES = {"int32": 31, "int64": 63}
# What every resource has, whatever its schema says.
_IMPLIED = ("apiVersion", "kind", "metadata")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Schemas:
    """The schemas of some folders' definitions.

    Args:
        folders: with YAML files of CustomResourceDefinitions.
    """

    def __init__(self, *folders: Path) -> None:
        self._schemas: dict[tuple[str, str], dict[str, Any]] = {}
        for path in sorted(path for folder in folders for path in folder.glob("*.yaml")):
            for definition in yaml.load_all(path.read_text(), Loader=_LOADER):
                spec = definition["spec"]
                for version in spec["versions"]:
                    api = f"{spec['group']}/{version['name']}"
                    schema = version["schema"]["openAPIV3Schema"]
                    self._schemas[api, spec["names"]["kind"]] = schema

    def __contains__(self, resource: dict[str, Any]) -> bool:
        return (resource.get("apiVersion", ""), resource.get("kind", "")) in self._schemas

    def of(self, resource: dict[str, Any]) -> dict[str, Any]:
        return self._schemas[resource["apiVersion"], resource["kind"]]

    def check(self, resource: dict[str, Any]) -> list[str]:
        """What is wrong with a resource; nothing is metadata's, which no definition describes."""
        schema = self.of(resource)
        free = {"x-kubernetes-preserve-unknown-fields": True}
        properties = schema.get("properties", {}) | dict.fromkeys(_IMPLIED, free)
        return list(check(resource, {**schema, "properties": properties}, ""))


def check(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """What is wrong with a value, each as ``path: finding``."""
    if value is None:
        if not schema.get("nullable"):
            yield f"{path}: is null"
        return
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            yield f"{path}: {value!r} is neither an integer nor a string"
            return
    elif "type" in schema:
        kind = _TYPES[schema["type"]]
        is_number = schema["type"] in ("integer", "number") and isinstance(value, bool)
        if not isinstance(value, kind) or is_number:
            yield f"{path}: {value!r} is no {schema['type']}"
            return
    if isinstance(value, dict):
        yield from _check_object(value, schema, path)
    elif isinstance(value, list):
        yield from _check_list(value, schema, path)
    else:
        yield from _check_scalar(value, schema, path)
    yield from _check_alternatives(value, schema, path)
    for rule in schema.get("x-kubernetes-validations") or ():
        # Rules about changes don't hold for what is new.
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{path}: {rule.get('message') or rule['rule']}"


def _check_object(value: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    properties = schema.get("properties") or {}
    others = schema.get("additionalProperties")
    for name in schema.get("required") or ():
        # A default is filled in before what is required is asked for.
        if name not in value and "default" not in properties.get(name, {}):
            yield f"{path}.{name}: is required"
    for name, inner in value.items():
        if name in properties:
            yield from check(inner, properties[name], f"{path}.{name}")
        elif isinstance(others, dict):
            yield from check(inner, others, f"{path}.{name}")
        elif not (others or schema.get("x-kubernetes-preserve-unknown-fields")):
            yield f"{path}.{name}: is unknown"
    if len(value) < schema.get("minProperties", 0):
        yield f"{path}: has {len(value)} fields"
    if len(value) > schema.get("maxProperties", len(value)):
        yield f"{path}: has {len(value)} fields"


def _check_list(value: list[Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    for number, inner in enumerate(value):
        yield from check(inner, schema.get("items") or {}, f"{path}[{number}]")
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{path}: has {len(value)} entries"
    keys: list[str] = []
    if schema.get("x-kubernetes-list-type") == "map":
        names = schema["x-kubernetes-list-map-keys"]
        defaults = {
            name: entry.get("default") for name, entry in schema["items"]["properties"].items()
        }
        keys = [
            json.dumps([each.get(name, defaults.get(name)) for name in names])
            for each in value
            if isinstance(each, dict)
        ]
    elif schema.get("x-kubernetes-list-type") == "set" or schema.get("uniqueItems"):
        keys = [json.dumps(each, sort_keys=True) for each in value]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        yield f"{path}: has {key} twice"


def _check_scalar(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{path}: {value!r} does not match {schema['pattern']}"
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{path}: {value!r} has {len(value)} characters"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        bits = _RANGES.get(schema.get("format", ""))
        if bits and not -(2**bits) <= value < 2**bits:
            yield f"{path}: {value!r} is no {schema['format']}"
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            yield f"{path}: {value!r} is out of range"


def _check_alternatives(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    def fits(other: dict[str, Any]) -> bool:
        # These say nothing about which fields there are.
        return not list(check(value, {"x-kubernetes-preserve-unknown-fields": True, **other}, path))

    if schema.get("anyOf") and not any(map(fits, schema["anyOf"])):
        yield f"{path}: fits none of anyOf"
    if schema.get("oneOf") and sum(map(fits, schema["oneOf"])) != 1:
        yield f"{path}: fits not just one of oneOf"
    if not all(map(fits, schema.get("allOf") or ())):
        yield f"{path}: does not fit all of allOf"
    if schema.get("not") and fits(schema["not"]):
        yield f"{path}: fits what it may not"


@functools.cache
def _environment() -> Any:
    return cel.NewEnv(variables={"self": cel.Type.DYN})


@functools.cache
def _compiled(rule: str) -> Any:
    return _environment().compile(rule)


def _holds(rule: str, value: Any) -> bool:
    # One that can't be evaluated is no true, and so a finding.
    return _compiled(rule).eval(data={"self": value}).value() is True
