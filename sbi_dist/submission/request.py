"""What is submitted: the command, its files, and the name that the same submission gets again."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from sbi_dist.errors import InputError
from sbi_dist.experiment import Experiment, digest, load_experiment, shipped
from sbi_dist.progress import say
from sbi_dist.submission.package import Package, collect

__all__ = ["STOP_S", "Options", "Request", "make_request"]

# How long a job that is stopped may take to write what it has; Ray's own default is 3 s.
STOP_S = 30
_SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|_KEY|^KEY", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a stage is submitted.

    Attributes:
        upload: whether the experiment's files are sent; else they are on the cluster.
        exclude: patterns of files that are not.
        env: environment variables for the job, ``NAME`` (as it is here) or ``NAME=VALUE``.
        python: the cluster's interpreter that sbi_dist is installed in.
    """

    upload: bool = True
    exclude: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    python: str = "python"


@dataclasses.dataclass(frozen=True)
class Request:
    """A stage of an experiment, as a job.

    Attributes:
        name: the experiment's.
        arguments: the stage and its arguments, as the job gives them to the command line.
        package: the files that it needs; None where they are on the cluster.
        env: environment variables for it.
        python: the interpreter.
        store: where its results go; empty where only the cluster knows.
        fingerprint: 10 hex digits that change with anything of the above.
    """

    name: str
    arguments: tuple[str, ...]
    package: Package | None
    env: Mapping[str, str]
    python: str
    store: str
    fingerprint: str

    @property
    def id(self) -> str:
        """The beginning of the ids of its jobs; a number follows for each attempt."""
        return f"{self.name}-{self.arguments[0]}-{self.fingerprint}"

    @property
    def version(self) -> str:
        return metadata.version("sbi_dist")

    @property
    def package_name(self) -> str:
        assert self.package is not None
        return f"_ray_pkg_sbi_dist_{self.package.digest()}.zip"

    def entrypoint(self) -> str:
        """The job's command, for a shell."""
        words = [self.python, "-m", "sbi_dist.submission.job", self.version, *self.arguments]
        # In the shell's place: left by it, its end would be known only once process 1 sees to it.
        return f"exec {shlex.join(words)}"

    def runtime_env(self) -> dict[str, Any]:
        """What the job's processes need, in Ray's terms."""
        found: dict[str, Any] = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **self.env},
        }
        if self.package is not None:
            found["working_dir"] = f"gcs://{self.package_name}"
        return found

    def metadata(self, attempt: int) -> dict[str, str]:
        """What is noted with the job, for whoever looks at it."""
        return {
            "sbi_dist": self.version,
            "experiment": self.name,
            "stage": self.arguments[0],
            "fingerprint": self.fingerprint,
            "attempt": str(attempt),
            "store": self.store,
        }


def make_request(
    stage: str, reference: str, arguments: Sequence[tuple[str, str | None]], options: Options
) -> Request:
    """A stage of an experiment as a request.

    Args:
        stage: name of the command.
        reference: a file, or the name of a shipped experiment; without upload, a path that the
            cluster has.
        arguments: the stage's options with their values, None for a flag.

    Raises:
        InputError: the experiment can't be used, or a path would not be what it is here; names the
            field, its value and what to give.
    """
    given = list(arguments)
    env = _environment(options.env)
    _require_lasting(given, "--output")
    _require_lasting(given, "--arviz")
    package, store = None, ""
    known = reference in shipped() and not Path(reference).expanduser().is_file()
    if options.upload or known:
        overrides = [value or "" for name, value in given if name == "--set"]
        for name, field in (("--store", "store"), ("--observations", "infer.observations")):
            overrides += [
                f"{field}={yaml.safe_dump(value).splitlines()[0]}"
                for flag, value in given
                if flag == name
            ]
        experiment, base = load_experiment(reference, overrides)
        _require_lasting([("store", experiment.store)], "store")
        name, store = experiment.name, experiment.store
        content = _without_place(experiment)
        if options.upload:
            package, reference, given = _files(
                reference, experiment, base, given, options.exclude, known
            )
    else:
        values = dict(
            (value or "").split("=", 1)
            for flag, value in given
            if flag == "--set" and "=" in (value or "")
        )
        name = values.get("name", Path(reference).stem)
        store = next((value or "" for flag, value in given if flag == "--store"), "")
        if store:
            _require_lasting([("--store", store)], "--store")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise InputError(
                f"experiment is {reference!r}; without upload it must be the name of a shipped "
                "experiment, or the path of a file on the cluster"
            )
        content = {}
    words = [stage, reference]
    for flag, value in given:
        words += [flag] if value is None else [flag, value]
    asked = {
        "version": metadata.version("sbi_dist"),
        "words": words,
        "experiment": content,
        "files": None if package is None else package.digest(),
        # A secret's value leaves no trace, not even in a digest.
        "env": {key: "" if _SECRET.search(key) else value for key, value in env.items()},
        "python": options.python,
    }
    return Request(
        name, tuple(words), package, env, options.python, _public(store), digest(asked, 10)
    )


def _files(
    reference: str,
    experiment: Experiment,
    base: Path,
    given: list[tuple[str, str | None]],
    exclude: Sequence[str],
    known: bool,
) -> tuple[Package | None, str, list[tuple[str, str | None]]]:
    """What is uploaded, and the experiment's path and the arguments as they are there."""
    added: dict[str, Path] = {}
    observations = experiment.infer.observations
    if observations is not None and not _is_remote(observations):
        path = Path(observations)
        if not path.is_file():
            raise InputError(
                f"--observations {observations}: there is no such file here to upload; give one, "
                "or s3://bucket/path or an absolute path that the cluster has"
            )
        there = f"observations/{path.name}"
        added[there] = path.resolve()
        given = [pair for pair in given if pair[0] != "--observations"]
        given.append(("--set", f"infer.observations={yaml.safe_dump(there).splitlines()[0]}"))
    if known:
        if not added:
            return None, reference, given
        return Package(Path.cwd(), added), reference, given
    file = Path(reference).expanduser().resolve()
    root, needed = base, []
    place, _, attribute = experiment.problem.rpartition(":")
    if place.endswith(".py"):
        problem = Path(place).expanduser()
        inside = Path(os.path.abspath(base / problem))
        if not inside.is_file():
            raise InputError(f"problem: there is no file {inside}")
        if base not in inside.parents:
            raise InputError(
                f"problem is {experiment.problem!r}, and {inside} is outside the folder {base} "
                "that is uploaded; move it beside the experiment file, or give --no-upload where "
                "the cluster has both"
            )
        relative = inside.relative_to(base).as_posix()
        needed.append(relative)
        if problem.is_absolute():
            given.append(("--set", f"problem={relative}:{attribute}"))
    elif _has_module(base, place):
        pass
    elif Path.cwd() in base.parents and _has_module(Path.cwd(), place):
        root = Path.cwd()
    else:  # a module that is installed, or of sbi_dist
        name = file.name
        return Package(base, {name: file, **added}), name, given
    name = file.relative_to(root).as_posix()
    kept = Path(experiment.store).expanduser()
    leave = [*exclude, "/sbi_dist/"]  # a checkout of it would be in the place of the cluster's own
    if root in kept.parents:
        leave.append(f"/{kept.relative_to(root).as_posix()}/")
    package = collect(root, [name, *needed], leave, added)
    say(f"submit: uploads {package.describe()}")
    return package, name, given


def _has_module(folder: Path, name: str) -> bool:
    first = name.partition(".")[0]
    if first == "sbi_dist":  # the cluster's own, be it a checkout of it that we are in
        return False
    return (folder / first).is_dir() or (folder / f"{first}.py").is_file()


def _is_remote(uri: str) -> bool:
    return "://" in uri or Path(uri).is_absolute()


def _require_lasting(values: Sequence[tuple[str, str | None]], name: str) -> None:
    """Check that a place for results is none in the job's own folder, which goes with the job."""
    # A file for ArviZ is written by a library that knows no S3.
    what = "s3://bucket/prefix, or an absolute path of a directory"
    if name == "--arviz":
        what = "an absolute path in a directory"
    for flag, value in values:
        lasts = value and (Path(value).is_absolute() if name == "--arviz" else _is_remote(value))
        if flag == name and value and not lasts:
            raise InputError(
                f"{name} is {value!r}, which would be in the job's own folder and go with it; give "
                f"{'--store' if name == 'store' else name} {what} that all machines of the cluster "
                "share"
            )


def _without_place(experiment: Experiment) -> dict[str, Any]:
    found = experiment.resolved()
    del found["problem"], found["infer"]["observations"]  # in the words, as they are there
    return found


def _public(store: str) -> str:
    parts = urlparse(store)
    return (
        store.replace(f"{parts.netloc.rpartition('@')[0]}@", "") if "@" in parts.netloc else store
    )


def _environment(given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in given:
        name, separator, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"--env {name!r} must be the name of a variable, or NAME=VALUE")
        if not separator:
            if name not in os.environ:
                raise InputError(
                    f"--env {name}: there is no such variable here; set it, or give --env "
                    f"{name}=VALUE"
                )
            value = os.environ[name]
        if _SECRET.search(name):
            say(
                f"submit: warning: --env {name} looks like a secret; whoever may ask the cluster "
                "about its jobs can read it, so better let the cluster have it (an instance role, "
                "a service account, a mounted secret)"
            )
        found[name] = value
    return found
