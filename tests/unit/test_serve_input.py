"""``sbi-dist serve`` with what can't be served: one sentence and exit code 2, without Ray."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbi_dist.cli import run_command
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.serving import command
from sbi_dist.store import LocalStore


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose experiment ``gaussian`` has a promoted model; Ray is out of reach."""

    def connected(address: str | None) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(command, "connected", connected)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    LocalStore(tmp_path / "gaussian").put(PROMOTED, b'{"model": "one"}')
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens, on all of the machine's addresses."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield other.getsockname()[1]


class Refused:
    """Runs the command, which is to refuse; what it says."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._root, self._capsys = root, capsys

    def __call__(self, *arguments: str, experiment: str = "gaussian") -> str:
        code = run_command(["serve", experiment, "--store", str(self._root), *arguments])
        out, said = self._capsys.readouterr()
        assert code == 2 and out == "", said
        assert said.startswith("sbi-dist: ") and said.count("\n") == 1, said
        return said


@pytest.fixture
def refused(root: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(root, capsys)


def test_the_port_is_taken(refused: Refused, taken: int) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        said = refused("--port", str(taken), "--host", host)
        assert f"serve.port is {taken} on '{host}'" in said
        assert "--set serve.port=N" in said


@pytest.mark.parametrize("host", ["203.0.113.9", "host.invalid", "::", "::1"])
def test_no_address_of_this_machine(refused: Refused, host: str) -> None:
    said = refused("--host", host)
    assert f"serve.host is '{host}'" in said and "127.0.0.1" in said and "0.0.0.0" in said


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"{"])
def test_no_model_is_promoted(refused: Refused, root: Path, content: bytes | None) -> None:
    place = root / "gaussian" / PROMOTED
    place.unlink()
    if content is not None:
        place.write_bytes(content)
    said = refused()
    assert f"{root}/gaussian holds no trained model" in said and "sbi-dist run" in said


def test_unknown_experiment(refused: Refused) -> None:
    assert "'gausian'" in (said := refused(experiment="gausian")) and "gaussian" in said


def test_detached_from_a_ray_that_ends(refused: Refused) -> None:
    assert "--detach needs --address" in refused("--detach")


def test_no_cluster_at_the_address(root: Path, capsys, monkeypatch) -> None:
    monkeypatch.undo()  # that Ray is out of reach
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        said = Refused(root, capsys)("--address", address, "--detach")
    assert f"no Ray cluster can be reached at '{address}'" in said


@pytest.mark.parametrize("content", ["", "\n\n", "# only\n  # comments\n"])
def test_no_token_in_the_file(refused: Refused, tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    said = refused("--set", f"serve.tokens_file={file}")
    assert f"serve.tokens_file is '{file}', which holds no token" in said


def test_the_file_of_tokens_can_t_be_read(refused: Refused, tmp_path: Path) -> None:
    nonsense, locked = tmp_path / "nonsense", tmp_path / "locked"
    nonsense.write_bytes(b"secretDoNotShow\xff\n")
    locked.write_text("secretDoNotShow\n")
    locked.chmod(0)
    files = [tmp_path / "none", tmp_path, nonsense]
    try:
        locked.read_text()
    except PermissionError:  # root may read it all the same
        files.append(locked)
    for file in files:
        said = refused("--set", f"serve.tokens_file={file}")
        assert f"serve.tokens_file is '{file}', which can't be read" in said
        assert "one token a line" in said and "secret" not in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("serve.port=0", "serve.port is 0; it must be at least 1"),
        ("serve.port=65536", "serve.port is 65536; it must be at most 65535"),
        ("serve.max_replicas=1", "serve.max_replicas is 1; it must be at least min_replicas, 2"),
        ("serve.timeout_s=601", "serve.timeout_s is 601; it must be at most max_timeout_s, 600"),
        ("serve.host=", "serve.host is"),
        ("serve.proxy=nginx", "serve.proxy is 'nginx'; allowed: haproxy, ray"),
        ("serve.tokens_file=12", "serve.tokens_file is 12; it must be of type string"),
        ("serve.replicas=2", "did you mean 'serve.min_replicas'?"),
    ],
)
def test_values_that_are_not_allowed(refused: Refused, given: str, words: str) -> None:
    assert words in refused("--set", "serve.min_replicas=2", "--set", given)
