"""What is submitted, to where, and under which name. About 3 s."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sbi_dist.cli import run_command
from sbi_dist.errors import InputError
from sbi_dist.submission import package
from sbi_dist.submission.access import dashboard_url, find_token, shown
from sbi_dist.submission.api import JobApi
from sbi_dist.submission.package import collect
from sbi_dist.submission.request import Options, Request, make_request

STORE = ("--store", "s3://bucket/prefix")


@pytest.fixture(autouse=True)
def _no_ray_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment with a problem, and what does not belong to it."""
    place = tmp_path / "decay"
    files = {
        "decay.yaml": yaml.safe_dump({"problem": "decay.py:problem"}),
        "decay.py": "problem = None",
        "data/counts.csv": "1,2",
        "run.sh": "true",
        ".aws/credentials": "secret",
        ".env": "secret",
        "__pycache__/decay.pyc": "",
        "runs/decay/simulations/shard-000000.parquet": "many",
        "big.npy": "ignored",
        "first.log": "what was said before",
        ".gitignore": "*.npy\n",
    }
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)
    (place / "run.sh").chmod(0o755)
    return place


def request(place: Path, *given: tuple[str, str | None], **options: Any) -> Request:
    return make_request("simulate", str(place / "decay.yaml"), [STORE, *given], Options(**options))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "is where Ray's client connects to.*perhaps http://head:8265"),
        ("head:6379", "is where the processes of a cluster connect to.*http://head:8265"),
        ("head:8265", "has no http:// before it.*perhaps http://head:8265"),
        ("auto", "has no http:// before it; jobs are submitted to http://HOST:8265"),
        ("ftp://head:21", "ftp: URL|processes of a cluster"),
        ("http://", "is no such URL"),
        ("http://head:port", "(?i)port"),
        ("http://user:hidden@head:x", "'http://head:x'"),
        ("http://[::1:8265", "has a host or a port that can't be read"),
        ("http://user:hidden@he\u2100d:8265", "has a host or a port that can't be read"),
        (None, "--address is missing; give http://HOST:8265"),
    ],
)
def test_addresses_that_are_none_of_a_dashboard(address: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        dashboard_url(address)
    assert "hidden" not in str(raised.value)


def test_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert dashboard_url("https://head/ray/") == "https://head/ray"
    with pytest.raises(InputError, match="missing"):
        dashboard_url(None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    assert dashboard_url(None) == "http://head:8265"
    assert shown("https://name:word@head/a@b") == "https://head/a@b"


def test_where_a_token_is_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text("third\n")
    assert find_token() == ("third", f"the file {tmp_path}/home/.ray/auth_token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="can't be read or is empty"):
        find_token()
    (tmp_path / "missing").write_text("second")
    found = find_token()
    assert found is not None and found[0] == "second"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    assert find_token() == ("first", "the variable RAY_AUTH_TOKEN")


@pytest.mark.parametrize("token", ["abc\ndef SECRET", "abc\tSECRET", "SECRETé", "SECRET\x7f"])
def test_a_token_that_can_not_be_sent_is_not_told(
    token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    for variable, value, place in (
        ("RAY_AUTH_TOKEN", token, "the variable RAY_AUTH_TOKEN"),
        ("RAY_AUTH_TOKEN_PATH", str(file), f"the file {file}"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv(variable, value)
            assert run_command(["jobs", "list", "--address", "http://127.0.0.1:1"]) == 2
        err = capfd.readouterr().err
        assert f"the token of {place} has more than one line" in err
        assert "SECRET" not in err and "abc" not in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Cookie", "a=SECRET\nX: y"), ("Cookie", "a=SECRETé"), ("Cookie", " SECRET"),
        ("Coo kie", "SECRET"), ("Cookié", "SECRET"), ("", "SECRET"),
    ],
)  # fmt: skip
def test_headers_that_can_not_be_sent_are_not_told(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", json.dumps({"X-Good": "yes", name: value}))
    assert run_command(["jobs", "list", "--address", "http://127.0.0.1:1"]) == 2
    err = capfd.readouterr().err
    assert f"RAY_JOB_HEADERS: {name!r} is no header that can be sent" in err
    assert "SECRET" not in err and "Traceback" not in err


@pytest.mark.parametrize("host", ["ex..ample:8265", f"{'a' * 64}.org", "a\x01b", "1.2.3.400"])
def test_hosts_that_can_not_be(host: str, capfd: Any) -> None:
    assert run_command(["jobs", "list", "--address", f"http://user:hidden@{host}"]) == 2
    err = capfd.readouterr().err
    assert "--address" in err and "give http://HOST:8265" in err
    assert "Traceback" not in err and "hidden" not in err and "unexpected" not in err


@pytest.fixture
def server() -> Iterator[Callable[[bytes | None], str]]:
    """Gives the URL of a server that answers a request with these bytes, or never."""
    listeners: list[socket.socket] = []

    def start(answer: bytes | None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.recv(65536)
                if answer is not None:
                    connection.sendall(answer)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "not as the dashboard of a Ray"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "not as the dashboard of a Ray"),
        (b"HTTP/1.1 302 Found\r\nLocation: /in\r\nContent-Length: 0\r\n\r\n", "HTTP status 302"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n", "as a proxy does whose server is away"),
        (b"\x00\x00\x12\x04\x00\x00", "does not speak HTTP"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "asks for a token"),
    ],
)
def test_servers_that_are_no_dashboard(
    server: Callable[[bytes | None], str], answer: bytes, said: str, capfd: Any, folder: Path
) -> None:
    words = ["submit", "status", str(folder / "decay.yaml"), *STORE, "--address", server(answer)]
    assert run_command(words) == 2
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err and err.count("sbi-dist:") == 1


def test_nothing_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(InputError, match=r"--address: nothing answers at http://127\.0\.0\.1"):
        JobApi(f"http://127.0.0.1:{port}").check()


def test_a_token_is_not_sent_before_it_is_asked_for(
    server: Callable[[bytes | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "word")
    assert "Authorization" not in JobApi("http://head").headers
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert JobApi("http://head").headers == {"Authorization": "Bearer word"}
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"authorization": "Basic 1"}')
    assert JobApi("http://head").headers == {"authorization": "Basic 1"}


def test_what_is_uploaded(folder: Path) -> None:
    asked = request(folder)
    assert asked.package is not None
    names = ["data/counts.csv", "decay.py", "decay.yaml", "run.sh"]
    assert list(asked.package.files) == names
    first = asked.package.zipped()
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.namelist() == names
        assert archive.read("data/counts.csv") == b"1,2"
        modes = {each.filename: each.external_attr >> 16 & 0o777 for each in archive.infolist()}
    assert modes["run.sh"] == 0o755 and modes["decay.py"] == 0o644
    os.utime(folder / "decay.py", (1, 1))
    again = request(folder)
    assert again.package is not None and again.package.zipped() == first and again.id == asked.id
    assert asked.arguments == ("simulate", "decay.yaml", *STORE)
    assert asked.runtime_env()["working_dir"] == f"gcs://{asked.package_name}"

    fewer = request(folder, exclude=("data/",)).package
    assert fewer is not None and list(fewer.files) == names[1:]
    # The problem and the experiment are needed, whatever is left out.
    least = request(folder, exclude=("*",)).package
    assert least is not None and list(least.files) == ["decay.py", "decay.yaml"]


def test_output_into_the_folder_is_not_uploaded(folder: Path) -> None:
    """Else the same submission would be another one."""
    words = ["submit", "status", "decay.yaml", *STORE, "--address", "http://127.0.0.1:1"]
    code = f"from sbi_dist.cli import main; main({words!r})"
    with (folder / "said.txt").open("w") as said:
        subprocess.run([sys.executable, "-c", code], cwd=folder, stderr=said, timeout=60)
    assert "submit: uploads 4 files" in (folder / "said.txt").read_text()


def test_a_line_of_rayignore_takes_what_is_left_out_else(folder: Path) -> None:
    (folder / ".rayignore").write_text("data/\n!big.npy\n!first.log\n")
    found = request(folder).package
    assert found is not None
    assert list(found.files) == ["big.npy", "decay.py", "decay.yaml", "first.log", "run.sh"]


def test_the_store_is_not_uploaded(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/shard").write_text("many")
    found = make_request(
        "simulate", str(folder / "decay.yaml"), [("--store", str(folder / "out"))], Options()
    )
    assert found.package is not None and "out/shard" not in found.package.files


def test_only_the_experiment_where_the_problem_is_installed(folder: Path, tmp_path: Path) -> None:
    (folder / "decay.yaml").write_text("problem: sbi_dist.problems.gaussian:problem\n")
    alone = request(folder).package
    assert alone is not None and list(alone.files) == ["decay.yaml"]
    assert make_request("run", "gaussian", [STORE], Options()).package is None
    # Also from a checkout of sbi_dist, which would be in the place of the cluster's own.
    for checkout in (folder, tmp_path):
        (checkout / "sbi_dist/problems").mkdir(parents=True)
        (checkout / "sbi_dist/__init__.py").write_text("")
        alone = request(folder).package
        assert alone is not None and list(alone.files) == ["decay.yaml"]
    (folder / "decay.yaml").write_text("problem: decay.py:problem\n")
    beside = request(folder).package
    assert beside is not None and "decay.py" in beside.files
    assert not any(name.startswith("sbi_dist/") for name in beside.files)
    # A package beside the folder, where the command is run.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("")
    (folder / "decay.yaml").write_text("problem: mine.model:problem\n")
    both = request(folder)
    assert both.package is not None and "mine/__init__.py" in both.package.files
    assert both.arguments[1] == "decay/decay.yaml"


def test_observations_are_sent_along(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "catalog.csv").write_text("x\n1\n")
    given = [STORE, ("--observations", "catalog.csv")]
    asked = make_request("infer", str(folder / "decay.yaml"), given, Options())
    assert asked.package is not None
    assert asked.package.files["observations/catalog.csv"] == tmp_path / "catalog.csv"
    assert asked.arguments[-2:] == ("--set", "infer.observations=observations/catalog.csv")
    assert "--observations" not in asked.arguments
    elsewhere = [STORE, ("--observations", "s3://bucket/catalog.csv")]
    kept = make_request("infer", str(folder / "decay.yaml"), elsewhere, Options())
    assert "s3://bucket/catalog.csv" in kept.arguments
    with pytest.raises(InputError, match="there is no such file here to upload"):
        make_request("infer", "gaussian", [STORE, ("--observations", "none.csv")], Options())


def test_too_much_to_upload(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "noise.bin").write_bytes(os.urandom(20_000))
    monkeypatch.setattr(package, "MAX_BYTES", 10_000)
    found = collect(folder, [], [], {})
    with pytest.raises(InputError, match=r"the largest are noise\.bin \(0\.0 MB\).*--exclude"):
        found.zipped()
    monkeypatch.setattr(package, "MAX_FILES", 2)
    with pytest.raises(InputError, match="has 3 or more files"):
        collect(folder, [], [], {})


def test_the_same_submission_has_the_same_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    ids = {
        request(folder).id,
        request(folder, ("--set", "simulate.seed=1")).id,
        request(folder, ("--repair", None)).id,
        request(folder, python="/opt/python").id,
        request(folder, env=("A=1",)).id,
        request(folder, env=("A=2",)).id,
        make_request("run", str(folder / "decay.yaml"), [STORE], Options()).id,
        make_request("simulate", str(folder / "decay.yaml"), [("--store", "/a")], Options()).id,
    }
    assert len(ids) == 8
    assert all(name.startswith(("decay-simulate-", "decay-run-")) for name in ids)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "one")
    asked = request(folder, env=("AWS_SECRET_ACCESS_KEY",))
    assert asked.runtime_env()["env_vars"]["AWS_SECRET_ACCESS_KEY"] == "one"
    assert "warning: --env AWS_SECRET_ACCESS_KEY looks like a secret" in capfd.readouterr().err
    assert "one" not in str(asked.metadata(1)) + asked.entrypoint()
    assert request(folder).runtime_env()["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}
    (folder / "decay.py").write_text("problem = 1")
    assert request(folder).id not in ids


def test_shipped_or_in_an_image() -> None:
    options = Options(upload=False)
    inside = make_request("run", "/home/sbi/mine.yaml", [("--set", "name=mine")], options)
    assert inside.package is None and "working_dir" not in inside.runtime_env()
    assert inside.id.startswith("mine-run-") and inside.metadata(2)["attempt"] == "2"
    assert inside.entrypoint().endswith("run /home/sbi/mine.yaml --set name=mine")
    assert inside.entrypoint().startswith("exec python -m sbi_dist.submission.job ")
    quoted = make_request("run", "/a b.yaml", [("--set", "name=mine")], options)
    assert quoted.entrypoint().endswith("run '/a b.yaml' --set name=mine")


def test_another_version_on_the_cluster(tmp_path: Path) -> None:
    words = ["-m", "sbi_dist.submission.job", "0.0.0", "status", "gaussian"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"sbi-dist: the cluster has sbi_dist \S+, .* by 0\.0\.0; .*\n", done.stderr)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sumulate", "gaussian"], "did you mean 'simulate'?"),
        (["serve", "gaussian"], "no job with an end"),
        (["run", "gausian", *STORE], "did you mean 'gaussian'?"),
        (["run", "nowhere.yaml", *STORE], "neither a file nor a shipped experiment"),
        (["run", "gaussian"], "store is 'runs', which would be in the job's own folder"),
        (["run", "gaussian", "--store", "~/runs"], "--store s3://bucket/prefix, or an absolute"),
        (["infer", "gaussian", *STORE, "--output", "out"], "--output is 'out'"),
        (
            ["infer", "gaussian", *STORE, "--arviz", "draws.nc"],
            "--arviz is 'draws.nc', which would",
        ),
        (["infer", "gaussian", *STORE, "--arviz", "s3://a/b.nc"], "--arviz an absolute path in a"),
        (["run", "gaussian", *STORE, "--set", "trian.seed=1"], "did you mean 'train'?"),
        (["run", "gaussian", *STORE, "--rows", "1"], "No such option"),
        (["verify", "gaussian", *STORE, "--rows", "many"], "'many' is not a valid integer"),
        (["run", "gaussian", *STORE, "--env", "NOT_SET"], "there is no such variable here"),
        (["run", "gaussian", *STORE, "--env", "A B=1"], "must be the name of a variable"),
        (["run"], "Missing argument"),
        (["run", "decay/decay.yaml", *STORE, "--set", "problem=/etc/x.py:p"], "there is no file"),
        (["run", "decay/decay.yaml", *STORE, "--set", "problem=../x.py:p"], "outside the folder"),
    ],
)
def test_bad_input(words: list[str], said: str, capfd: Any, folder: Path) -> None:
    """Before anything is asked of the cluster, which there is none of."""
    (folder.parent / "x.py").write_text("p = 1")
    assert run_command(["submit", *words, "--address", "http://127.0.0.1:1"]) == 2
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err
