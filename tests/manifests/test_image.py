"""The image: its Dockerfile as hadolint and as its own promises see it.

That its steps work is shown by ``python -m cluster.image.rehearsal``, by hand: it takes minutes.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster.image.rehearsal.dockerfile import Dockerfile, expand, ignored, pairs, words

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "cluster/image"
TEXT = (IMAGE / "Dockerfile").read_text()
IGNORE = (IMAGE / "Dockerfile.dockerignore").read_text().splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = Dockerfile.parse(TEXT)
FINAL = DOCKERFILE.stages[-1]


def _last(keyword: str) -> str:
    return [each.text for each in FINAL.instructions if each.keyword == keyword][-1]


def _all(keyword: str) -> list[tuple[str, str]]:
    return [
        (stage.name, each.text)
        for stage in DOCKERFILE.stages
        for each in stage.instructions
        if each.keyword == keyword
    ]


@pytest.fixture(scope="session")
def hadolint() -> str:
    beside = Path(sys.executable).with_name("hadolint")
    found = str(beside) if beside.exists() else shutil.which("hadolint")
    if found is None:
        reason = "hadolint is not installed; pip install -e '.[test]'"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


def _lint(hadolint: str, text: str) -> str:
    done = subprocess.run(
        [hadolint, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_hadolint_finds_nothing(hadolint: str) -> None:
    assert _lint(hadolint, TEXT) == ""


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("USER 1000:1000", "USER root"), "DL3002"),
        (("${BASE} AS base", "debian:latest AS base"), "DL3007"),
        (("WORKDIR /home/sbi", "WORKDIR home"), "DL3000"),
        (("--no-cache-dir --no-deps --root", "--no-deps --root"), "DL3042"),
        (('ENTRYPOINT ["/usr/bin/tini", "--"]', "ENTRYPOINT tini --"), "DL3025"),
        (("COPY --from=packages", "COPY --from=package"), "DL3022"),
        (("# hadolint ignore=DL3008\nRUN apt-get update", "RUN apt-get update"), "DL3008"),
    ],
)
def test_hadolint_finds_what_is_wrong(hadolint: str, change: tuple[str, str], rule: str) -> None:
    assert change[0] in TEXT
    assert rule in _lint(hadolint, TEXT.replace(*change, 1))


def test_every_exception_for_the_linter_is_one_of_those_explained() -> None:
    # DL3006: a base that is another stage, by a variable; DL3008: newest Debian packages, explained
    # at the first; SC2016: a variable for the login shell, not for the build.
    rules = re.findall(r"# hadolint ignore=(\S+)", TEXT)
    assert set(rules) == {"DL3006", "DL3008", "SC2016"}


def test_the_base_is_one_image_for_good() -> None:
    base = DOCKERFILE.globals({})["BASE"]
    assert re.fullmatch(r"debian:bookworm-\d{8}-slim@sha256:[0-9a-f]{64}", base)
    outside = {stage.base for stage in DOCKERFILE.stages if not DOCKERFILE.stage(stage.base)}
    assert outside == {"${BASE}", "torch-${VARIANT}", "runtime-${VARIANT}"}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_a_variant_is_made_of_its_own_stages(variant: str) -> None:
    other = {"cpu": "cuda", "cuda": "cpu"}[variant]
    names = [stage.name for stage in DOCKERFILE.needed({"VARIANT": variant})]
    assert {f"torch-{variant}", f"runtime-{variant}", "packages", "project"} <= set(names)
    assert not {f"torch-{other}", f"runtime-{other}"} & set(names)


def test_the_process_is_no_root_and_gets_signals() -> None:
    assert _last("USER") == "1000:1000" and _last("WORKDIR") == "/home/sbi"
    order = [each.keyword for each in FINAL.instructions]
    assert order.index("USER") > max(
        number for number, keyword in enumerate(order) if keyword in ("COPY", "RUN")
    )
    assert FINAL.instructions[-1].flags.keys() == {"interval", "timeout", "start-period", "retries"}
    for keyword in ("ENTRYPOINT", "CMD"):
        last = [each for each in FINAL.instructions if each.keyword == keyword][-1]
        assert last.listed, f"{keyword} needs the JSON form: a shell would keep SIGTERM to itself"
    assert not any("chown" in each.flags for each in FINAL.instructions)
    for program in ("tini", "wget", "rsync"):
        assert any(re.search(rf"install [^&]*\b{program}\b", text) for _, text in _all("RUN"))


def test_the_environment_has_what_the_launchers_read() -> None:
    variables = {name: value for _, text in _all("ENV") for name, value in pairs(text).items()}
    assert variables["HOME"] == "/home/sbi"  # `ray up` reads it from the image
    assert variables["PATH"].startswith("/opt/venv/bin:")
    suspicious = re.compile(r"secret|token|password|credential|aws_|_key", re.IGNORECASE)
    arguments = [text.partition("=")[0] for _, text in _all("ARG")]
    assert not [name for name in [*variables, *arguments] if suspicious.search(name)]
    # Seen by containers that asked for no GPU: it would show all of them.
    assert "NVIDIA_VISIBLE_DEVICES" not in variables


def test_labels_say_what_is_inside() -> None:
    labels = pairs(_last("LABEL"))
    lock = (ROOT / "requirements.lock").read_text()
    assert labels["org.opencontainers.image.version"] == PROJECT["version"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]
    assert f"ray=={labels['io.sbi-dist.ray']}\n" in lock
    assert {"title", "description", "revision", "base.name"} <= {
        name.removeprefix("org.opencontainers.image.") for name in labels
    }


def test_every_package_comes_at_the_locked_version() -> None:
    for stage, text in _all("RUN"):
        for command in re.findall(r"pip install [^&]*", text):
            assert "--constraint requirements.lock" in command or "--root /project ." in command, (
                f"{stage}: {command}"
            )


def test_the_packages_are_those_of_the_project() -> None:
    command = [sys.executable, str(IMAGE / "packages.py"), str(ROOT / "pyproject.toml")]
    printed = subprocess.run([*command, "coalescent"], capture_output=True, text=True, timeout=60)
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["coalescent"]
    assert printed.stdout.splitlines() == wanted, printed.stderr


def _context() -> set[str]:
    """The files that a build gets to see."""
    found = set()
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        # Nothing in these is let in again, and .venv alone has 50,000 files.
        folders[:] = [name for name in folders if name not in (".venv", ".git", "node_modules")]
        found |= {str(here / name) for name in names if not ignored(here / name, IGNORE)}
    return found


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    seen = _context()
    sources = {
        source
        for stage in DOCKERFILE.stages
        for each in stage.instructions
        if each.keyword == "COPY" and "from" not in each.flags
        for source in words(each.text)[:-1]
    }
    for source in sources:
        assert any(name == source or name.startswith(f"{source}/") for name in seen), source
    strays = {
        name
        for name in seen
        if not any(name == source or name.startswith(f"{source}/") for source in sources)
    }
    assert not strays
    assert {"jobs/run.py", "jobs/experiments/gaussian.yaml", "sbi_dist/cli.py"} <= seen
    assert not [name for name in seen if "__pycache__" in name]
    for left_out in (".venv/bin/python", ".git/config", "runs/x/report/index.html", ".env"):
        assert ignored(Path(left_out), IGNORE)


@pytest.mark.parametrize(
    ("path", "patterns", "expected"),
    [
        ("a/b", ["a"], True),
        ("a/b", ["/a/"], True),
        ("b/a", ["a"], False),
        ("b/a", ["**/a"], True),
        ("a", ["**/a"], True),
        ("a/b", ["*", "!a"], False),
        ("a/b.pyc", ["*", "!a", "**/*.py[cod]"], True),
        ("a/b/c", ["a/*", "!a/b"], False),
        ("a/b", ["!a", "a"], True),
        ("ab", ["a?"], True),
        ("a.b", ["a?b", "# !a.b"], True),
        ("axb", ["a.b"], False),
    ],
)
def test_patterns_of_what_is_left_out(path: str, patterns: list[str], expected: bool) -> None:
    assert ignored(Path(path), patterns) == expected


def test_variables_are_put_in_as_docker_does() -> None:
    known = {"A": "1", "EMPTY": ""}
    for text, expected in {
        "$A/${A}x": "1/1x",
        "${NONE}|$NONE": "|",
        "${EMPTY:-$A}": "1",
        "${A:+yes}${EMPTY:+no}": "yes",
    }.items():
        assert expand(text, known) == expected


def test_a_dockerfile_is_read_over_continued_lines_and_comments() -> None:
    text = (
        'ARG V=1\nFROM a:${V} AS x\nRUN one \\\n  # why\n  && two\nCOPY --from=a b c\nCMD ["d"]\n'
    )
    read = Dockerfile.parse(text)
    run, copy, command = read.stages[0].instructions
    assert run.command() == ["/bin/sh", "-c", "one && two"] and run.line == 3
    assert copy.flags == {"from": "a"} and words(copy.text) == ["b", "c"]
    assert command.command() == ["d"] and read.globals({"V": "2"}) == {"V": "2"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("FROM a\nRUN x \\\n", "continued"),
        ("RUN x\nFROM a\n", "before the first FROM"),
        ("FROM a\nRUM x\n", "'RUM' is not known"),
        ("FROM a\nRUN --mount=type=cache x\n", "flags"),
        ("# nothing\n", "no FROM"),
    ],
)
def test_a_dockerfile_that_can_not_be_read_says_where(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Dockerfile.parse(text)


def test_the_health_check_is_a_script_that_can_be_run() -> None:
    script = IMAGE / "healthy"
    assert os.access(script, os.X_OK)
    # Outside of a container there is another first process: nothing is asked, all is well.
    first = Path("/proc/1/cmdline").read_bytes().replace(b"\0", b" ")
    if any(word in first for word in (b"ray start ", b"sbi-dist serve ")):
        pytest.skip("the first process here is one that the check asks")
    assert subprocess.run([script], timeout=20).returncode == 0


def test_no_two_stages_have_one_name() -> None:
    names = [stage.name for stage in DOCKERFILE.stages]
    assert not [pair for pair in itertools.pairwise(sorted(names)) if len(set(pair)) == 1]
