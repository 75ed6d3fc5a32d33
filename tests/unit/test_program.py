"""Simulators that are programs of their own: fed, read, limited and cleaned up after."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sbi_dist.errors import InputError
from sbi_dist.program import Program, ProgramError, process
from sbi_dist.program.formats import Unreadable, check_columns, encode, read_x
from sbi_dist.program.watch import WATCH

THETA = np.array([0.1, -2.5e-300, 1 / 3])
BATCH = np.random.default_rng(0).normal(size=(4, 3))
NAMES = ["rate", "x, y", 'a "b"']


@pytest.fixture(autouse=True)
def _scratch_is_left_clean(tmp_path, monkeypatch):
    """Every test, whatever it does: no scratch directory stays."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(process.tempfile, "tempdir", None)
    yield
    assert os.listdir(scratch) == []


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str, mode: int = 0o755) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    return write_file


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shell(script: str, *arguments: str, **options: Any) -> Program:
    """A program of a line of sh, which sees ``arguments`` as $1, ..., and any parameters."""
    if not any("{theta_" in word or "{input}" in word for word in arguments):
        options.setdefault("stdin", "csv")
    script = script.replace("{", "{{").replace("}", "}}")
    return Program(["sh", "-c", script, "sh", *arguments], **options)


def read(text: str, kind: str = "csv", columns: Any = None) -> np.ndarray:
    return read_x(kind, text.encode(), check_columns(columns, kind), None)


def failure(program: Program, timeout_s: float | None = None) -> str:
    """Kind and message of the failure of a run."""
    with pytest.raises(ProgramError) as caught:
        program.run(THETA, rng(), timeout_s)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return f"{caught.value.status}: {caught.value}"


def ended(file: Path, count: int) -> bool:
    """Whether all processes end that programs write the numbers of into a file."""
    numbers: list[str] = []
    for _ in range(1000):
        numbers = file.read_text().split() if file.exists() else []
        if len(numbers) >= count and not any(map(alive, numbers)):
            return True
        time.sleep(0.005)
    return False


def alive(number: str) -> bool:
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


# ---- in and out ----------------------------------------------------------------------------------

FORMATS = ("csv", "npy", "json", "parquet")


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("source", "target"),
    [("{input}", "{output}"), ("{input}", "results/x"), ("/dev/stdin", "/dev/stdout")],
)
def test_every_way_in_and_out(source, target, kind, batch) -> None:
    """A program that copies its parameters gives them back to the last bit."""
    options: dict[str, Any] = {"parameter_names": NAMES, "batch": batch, "output_format": kind}
    options["stdin" if source == "/dev/stdin" else "input_format"] = kind
    if target == "results/x":
        options["output"] = target
    if kind == "json":
        options["columns"] = "theta"
    theta = BATCH if batch else THETA
    x = Program(["sh", "-c", 'cat "$0" > "$1"', source, target], **options)(theta, rng())
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x, theta)


def test_arguments() -> None:
    program = Program(
        "echo --rate={rate} {b} {rows} {{}} {rate}{b}",
        parameter_names=["rate", "b"],
        output_format="csv",
        columns=[1, 2],
    )
    # In float64, and other than a shell would: no quoting, no expansion.
    assert program(np.array([0.1, -1e-7])).tolist() == [-1e-7, 1.0]
    said = shell('printf "%s\\n" "$@" >&2; exit 1', "a b", "$HOME", "{theta_1}", "{{x}}", "*")
    assert failure(said).endswith("a b | $HOME | 0.1 | {x} | *")


def test_seed_is_of_the_generator_alone() -> None:
    program = Program(["echo", "{theta_1}", "{seed}"], columns=1)
    seeds = [program(THETA, rng(seed))[0] for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(0 <= seed < 2**31 and seed == int(seed) for seed in seeds)
    assert program(THETA)[0] != program(THETA)[0]
    document = Program("cat", stdin="json", output_format="json", columns="seed")
    assert document(THETA, rng(1)) == seeds[0]


def test_documents_as_a_program_sees_them() -> None:
    echo = shell("cat >&2; exit 1", parameter_names=NAMES)
    assert failure(echo).endswith('rate,"x, y","a ""b""" | 0.1,-2.5e-300,0.3333333333333333')
    single = shell("cat >&2; exit 1", stdin="json", parameter_names=["a", "b", "c"])
    document = json.loads(failure(single).partition("stderr: ")[2])
    seed = int(rng().integers(2**31))
    values = THETA.tolist()
    parameters = dict(zip("abc", values, strict=True))
    assert document == {"theta": values, "parameters": parameters, "seed": seed}
    document = json.loads(encode("json", np.array([[1, 2], [3, 4]]), "ab", 5))
    assert document["parameters"] == {"a": [1, 3], "b": [2, 4]}


floats = st.floats(allow_nan=False, width=64)


@given(st.lists(floats, min_size=1, max_size=5), st.integers(0, 3))
@example([5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf], 0)
@settings(deadline=None, max_examples=30)
def test_no_digit_is_lost(values, extra_rows) -> None:
    names = [f"p{i}" for i in range(len(values))]
    theta = np.array(values)
    batch = np.stack([theta] * (extra_rows + 1))
    for kind in FORMATS:
        columns = ("theta",) if kind == "json" else None
        for given_theta, rows in ((theta, None), (batch, len(batch))):
            x = read_x(kind, encode(kind, given_theta, names, 7), columns, rows)
            np.testing.assert_array_equal(x, given_theta)
            np.testing.assert_array_equal(np.signbit(x), np.signbit(given_theta))


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "x"),
    [
        ("1 2 3", {}, [1, 2, 3]),
        ("1,2,3\n", {}, [1, 2, 3]),
        ("1\n2\n3\n", {}, [1, 2, 3]),
        ("1, 2\n3, 4\n", {}, [[1, 2], [3, 4]]),
        ("a,b\n1,2\n3,4\n", {}, [[1, 2], [3, 4]]),
        ('"a b","c"\n"1",2\n', {}, [1, 2]),
        ("a b\n1 2\n\n3 4\n\n", {}, [[1, 2], [3, 4]]),
        ("# made by sim\n#a b\n1 2\n# the end\n", {}, [1, 2]),
        ("\ufeffa\n1\n", {}, [1]),
        ("1,,3\n", {}, [1, math.nan, 3]),
        ("1\t\t\n", {}, [1, math.nan, math.nan]),
        ("1 nan NA -inf\n", {}, [1, math.nan, math.nan, -math.inf]),
        ("1.5D+02 2d0 .5D-1\n", {}, [150, 2, 0.05]),
        ("t,u,v\n0,1,2\n1,3,4\n", {"columns": ["v", "u"]}, [[2, 1], [4, 3]]),
        ("t,u,v\n0,1,2\n1,3,4\n", {"columns": "u"}, [1, 3]),
        ("t,u,v\nmon,1,2\ntue,3,4\n", {"columns": ["u", 2]}, [[1, 2], [3, 4]]),
        ("# made by sim\nt u\n0 5\n", {"columns": ["u"]}, [5]),
        ("2020 1\n5 6\n", {"columns": "2020"}, [5]),
        ("3.5", {"kind": "json"}, 3.5),
        ("[1, null, NaN]", {"kind": "json"}, [1, math.nan, math.nan]),
        ("[[[1, 2]], [[3, 4]]]", {"kind": "json"}, [[[1, 2]], [[3, 4]]]),
        ('{"a": {"b": [1, 2]}}', {"kind": "json", "columns": "a.b"}, [1, 2]),
        (
            '{"a.b": 1, "a": {"b": 5, "c": {"d": 6}}}',
            {"kind": "json", "columns": ["a.b", "a.c.d"]},
            [1, 6],
        ),
        ('{"t": [1, 2], "u": [3, 4]}', {"kind": "json", "columns": ["t", "u"]}, [[1, 3], [2, 4]]),
    ],
)
def test_what_can_be_read(text, options, x) -> None:
    result = read(text, **options)
    assert result.shape == np.shape(x)
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, " is empty"),
        ("no convergence\n", {}, " holds no number, but 'no convergence'"),
        ("a,b\n", {"columns": "a"}, " has a header and no line of numbers"),
        ("1 2\n3 ****\n", {}, ", line 2: '****' is not a number"),
        ("1 2\n1_000 4\n", {}, ", line 2: '1_000' is not a number"),
        ("1 2\n# no\n3\n", {}, ", line 3: 1 values, expected 2"),
        ("1 2\n", {"columns": [2]}, " has 2 columns, but columns are (2,)"),
        (
            "time,rate\n1,2\n",
            {"columns": "rates"},
            " has no column 'rates' (did you mean 'rate'?); it has time, rate",
        ),
        ("{oops", {"kind": "json"}, " is no valid JSON (Expecting"),
        ('{"a": 1}', {"kind": "json"}, "holds an object; select of a with columns=[...]"),
        ("[[1], [2, 3]]", {"kind": "json"}, "holds no array of numbers ("),
        ("[]", {"kind": "json"}, "holds no number (its shape is (0,))"),
        (
            '{"fit": {"mean": 1}}',
            {"kind": "json", "columns": "fit.man"},
            "has no key 'fit.man' (did you mean 'mean'?); there are mean",
        ),
        (
            '{"a": [1], "b": 2}',
            {"kind": "json", "columns": ["a", "b"]},
            "has different shapes at the keys of columns: a (1,), b ()",
        ),
        ("xx", {"kind": "npy"}, " is no valid npy file ("),
        ("xx", {"kind": "parquet"}, " is no valid parquet file ("),
    ],
)
def test_what_can_not_be_read(text, options, message) -> None:
    with pytest.raises(Unreadable) as caught:
        read(text, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_npy_keeps_its_shape() -> None:
    for shape in ((1, 4), (2, 3, 4)):
        array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        x = read_x("npy", encode("npy", array, NAMES, 0), None, None)
        assert x.shape == shape and x.dtype == np.float32
        np.testing.assert_array_equal(x, array)
    with pytest.raises(Unreadable, match="has dtype <U1, expected real numbers"):
        read_x("npy", encode("npy", np.array(["a"]), NAMES, 0), None, None)


def parquet(columns: dict[str, Any], take: Any = None, rows: int | None = None) -> np.ndarray:
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return read_x("parquet", data.getvalue(), take, rows)


def test_parquet() -> None:
    table = {"t": ["a", "b"], "u": [1, None], "v": [True, False]}
    np.testing.assert_array_equal(parquet(table, ["v", "u"]), [[1, 1], [0, math.nan]])
    np.testing.assert_array_equal(parquet(table, [1]), [1, math.nan])
    for take, message in (
        (None, " has a column 't' of type string, not of numbers"),
        (["w"], " has no column 'w'; it has t, u, v"),
        ([3], r" has 3 columns, but columns are \(3,\)"),
    ):
        with pytest.raises(Unreadable, match=f"^{message}$"):
            parquet(table, take)
    lists = {"x": [[[1.0, 2.0]], [[3.0, 4.0]]]}
    np.testing.assert_array_equal(parquet(lists), [[[1, 2]], [[3, 4]]])
    np.testing.assert_array_equal(parquet({"x": [[1.0, 2.0]] * 4}, rows=4), [[1, 2]] * 4)


def test_a_batch_has_a_row_for_each_parameter_vector() -> None:
    for text, shape in ((b"1\n2\n3\n4\n", (4, 1)), (b"a,b\n" + b"1,2\n" * 4, (4, 2))):
        assert read_x("csv", text, None, 4).shape == shape
        with pytest.raises(Unreadable, match="batch of 3 parameter vectors must give 3 rows"):
            read_x("csv", text, None, 3)


def test_theta_of_another_shape() -> None:
    single = Program(["echo", "{theta_3}"])
    batch = Program("cat", stdin="csv", batch=True, parameter_names=NAMES)
    with pytest.raises(ValueError, match=r"shape \(4, 3\).*batch=False takes \(D,\)"):
        single(BATCH)
    with pytest.raises(ValueError, match=r"shape \(3,\).*batch=True takes \(N, D\)"):
        batch(THETA)
    with pytest.raises(ValueError, match=r"2 parameters, but program\.parameter_names has 3"):
        batch(BATCH[:, :2])
    with pytest.raises(ValueError, match=r"{theta_3}, but theta has fewer parameters"):
        single(THETA[:2])


def test_as_the_simulator_of_a_problem() -> None:
    from sbi_dist.simulator import detect_form, takes_rng

    draws = rng().normal(size=(12, 3)).astype(np.float32)
    for batch, theta in ((False, draws[0]), (True, draws)):
        command = ["awk", "-F,", "NR > 1 {{ print $1 + $2, $3, {seed} }}", "{input}"]
        program = pickle.loads(pickle.dumps(Program(command, batch=batch)))
        assert takes_rng(program)
        form = detect_form(program, draws)
        assert (form.batched, form.library, form.x_shape) == (batch, "numpy", (3,))
        first = program(theta, rng=rng(1))
        np.testing.assert_array_equal(first, program(theta, rng=rng(1)))
        np.testing.assert_allclose(first[..., 0], theta[..., :2].sum(-1), rtol=1e-4, atol=1e-4)


# ---- files and the environment -------------------------------------------------------------------


def test_files_travel_with_the_simulator(write, tmp_path, monkeypatch) -> None:
    write("home/sim", '#!/bin/sh\nexec sh parts/add.sh "$1" "$(cat data.txt)"\n', 0o644)
    write("home/parts/add.sh", 'test ! -x parts/add.sh && test -x helper && echo "$1 $2"\n', 0o644)
    write("home/helper", "#!/bin/sh\n")
    data = write("elsewhere/data.txt", "42\n", 0o644)
    options: dict[str, Any] = {"columns": 1}
    options["files"] = ["./sim", "parts/add.sh", Path("helper"), str(data)]
    base = tmp_path / "home"
    made = [
        Program(["./sim", "{theta_1}"], base=base, **options),
        Program("sim {theta_1}", base=str(base / "sim"), **options),
    ]
    monkeypatch.chdir(base)
    made.append(Program("./sim {theta_1}", **options))
    payloads = [pickle.dumps(program) for program in made]
    monkeypatch.chdir("/")
    shutil.rmtree(base)
    data.unlink()
    for payload in payloads:
        assert pickle.loads(payload)(THETA) == [42]


def test_environment_and_directory(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    script = (
        'test "$TMPDIR" = "$PWD" && test "$1" = "$PWD" && echo $OMP_NUM_THREADS $MKL_NUM_THREADS $A'
    )
    assert shell(script, "{scratch}", environment={"A": "5"})(THETA).tolist() == [1, 3, 5]
    assert shell(script, "{scratch}", environment={"MKL_NUM_THREADS": 2})(THETA).tolist() == [1, 2]
    other = tmp_path / "made" / "when needed"
    script = 'case "$PWD" in "$1"/*) echo 1;; esac'
    assert shell(script, str(other), scratch=other)(THETA) == [1]
    assert os.listdir(other) == []


# ---- arguments of Program ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"command": ["echo", "{rat}"]}, "{rat}, but there are rate, b, seed, input, output, scr"),
        ({"command": ["echo", "{rat}"]}, "did you mean 'rate'?"),
        ({"command": "echo {theta_0}", "parameter_names": None}, "by parameter_names=[...]"),
        ({"command": ["echo", "{ou"]}, "a single '{' in '{ou'; a brace itself is written '{{'"),
        ({"command": ["awk", "{print $1}"]}, "braces themselves are written {{ and }}"),
        ({"command": "echo {rate}", "batch": True}, "{rate}, which has no single value with batch"),
        ({"command": "echo {seed}"}, "passes no parameters to the program; use placeholders such"),
        ({"command": "echo 'a"}, "must be a list of strings, the program first, or one string"),
        ({"command": ["echo", 1, "{rate}"]}, "must be a list of strings"),
        ({"command": 5}, "must be a list of strings"),
        ({"command": "no-such-program {rate}"}, "neither one of files, nor a program on the PATH"),
        ({"command": "/etc/passwd {rate}"}, "nor the absolute path of an executable file on this"),
        ({"command": "simm {rate}", "files": ["sim"]}, "one of files (did you mean 'sim'?)"),
        ({"files": ["gone"]}, "gone can't be read (No such file or directory)"),
        ({"files": ["../sim"]}, "program.files is '../sim'; it must be a path relative"),
        ({"files": ["sim", "./sim"]}, "program: 'sim' is the name of more than one"),
        ({"command": "cp {input} {output}", "output": "input.csv"}, "'input.csv' is the name of"),
        ({"success_codes": ["0"]}, "program.success_codes is ['0']; it must be a list of exit"),
        ({"parameter_names": ["rate", "rate"]}, "must be a list of different strings"),
        ({"parameter_names": ["rate", "seed"]}, "none of them seed, input, output, scratch, rows"),
        ({"stdin": "cvs"}, "program.stdin is 'cvs'; allowed: csv, npy, json, parquet (did you"),
        ({"output": "x.out"}, "program.output is 'x.out', whose ending tells no format"),
        ({"output": "/x.csv"}, "program.output is '/x.csv'; it must be a path relative"),
        ({"output": "x.npy", "columns": "a"}, "an npy file has no columns"),
        ({"columns": [-1]}, "program.columns is [-1]; it must be a list of names"),
        ({"columns": 0, "output_format": "json"}, "columns is 0; it must be a list of keys"),
    ],
)
def test_unusable_arguments(arguments, message, write) -> None:
    base = write("base/sim", "echo 1\n").parent
    defaults = {"command": "echo {rate}", "parameter_names": ["rate", "b"], "base": base}
    with pytest.raises(InputError) as caught:
        Program(**{**defaults, **arguments})
    assert message in str(caught.value) and str(caught.value).startswith("program")


# ---- what identifies it --------------------------------------------------------------------------


def test_code_changes_with_what_is_computed(write, tmp_path) -> None:
    for name, result in (("a", 1), ("b", 1), ("c", 2)):
        write(f"{name}/sim", f"#!/bin/sh\necho {result}\n")
    same = {"command": "./sim {theta_1}", "files": ["sim"], "base": tmp_path / "a"}

    def text(**changes: Any) -> str:
        return json.dumps(Program(**{**same, **changes}).code(), sort_keys=True)

    first = text()
    assert first == text(base=tmp_path / "b", keep_failed="x", scratch=tmp_path)
    changes: list[dict[str, Any]] = [
        {"base": tmp_path / "c"},
        {"command": "./sim {theta_1} {seed}"},
        {"columns": [0]},
        {"columns": ["0"]},
        {"stdin": "csv"},
        {"environment": {"A": "1"}},
        {"output": "x.csv"},
        {"output_format": "json"},
        {"parameter_names": ["theta_1"]},
        {"success_codes": [0, 1]},
        {"stdin": "csv", "command": "sim", "batch": True},
    ]
    others = [text(**change) for change in changes]
    assert len({first, *others}) == len(others) + 1
    # Without files: the content counts, not the place.
    for words in ([], ["sh"]):
        a, b, c = (
            text(command=[*words, f"{tmp_path}/{name}/sim", "{theta_1}"], files=[])
            for name in "abc"
        )
        assert a == b != c and str(tmp_path) not in a + first + "".join(others)
    # What comes with the system or Python counts by its name.
    assert text(command="sh {theta_1}", files=[]) == text(command="/bin/sh {theta_1}", files=[])
    python = Program([sys.executable, "{theta_1}"]).code()["command"]
    assert python[0] == Path(sys.executable).name


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo a >&2; printf 'b\\n\\n c' >&2; exit 3", "ended with exit code 3; stderr: a | b | c"),
        ("echo said; exit 1", "ended with exit code 1; stdout: said"),
        ("exit 1", "ended with exit code 1"),
        ("sh -c 'kill -SEGV $$'; exit $?", "ended with exit code 139 (SIGSEGV of a command of it)"),
        ("printf '\\377' >&2; exit 1", "ended with exit code 1; stderr: \ufffd"),
        ('echo "$PWD/x: bad" >&2; exit 1', "ended with exit code 1; stderr: ./x: bad"),
    ],
)
def test_exit_codes_and_what_was_said(script, message) -> None:
    assert failure(shell(script)).startswith(f"error: {message}")
    assert shell("echo 1; exit 3", success_codes=(0, 3))(THETA) == [1]


def test_other_failures(write) -> None:
    said = failure(shell("seq 1 10000 >&2; exit 1"))
    assert said.endswith("| 9999 | 10000") and len(said) < 1050
    crash = shell("echo about to >&2; kill -SEGV $$")
    assert failure(crash) == "crashed: ended by SIGSEGV; stderr: about to"
    assert failure(shell("kill -KILL $$")) == "crashed: ended by SIGKILL (out of memory?)"
    missing = shell("echo why >&2", output="r.csv")
    assert failure(missing) == "error: r.csv was not written by the program; stderr: why"
    empty = shell(': > "$1"', "{output}", output_format="npy")
    assert failure(empty) == "error: output.npy is empty"
    for script in ("mkfifo r.csv", "mkdir r.csv", "ln -s /dev/zero r.csv"):
        assert failure(shell(script, output="r.csv")) == "error: r.csv is not a regular file"

    path = write("sim", "#!/no/such/interpreter\n")
    program = Program([str(path), "{theta_1}"])
    assert "can't be started (No such file or directory; a script must begin" in failure(program)
    path.write_text("echo 1\n")
    assert "can't be started (Exec format error; a script must begin" in failure(program)
    path.unlink()  # as on a worker that lacks it
    assert failure(program).endswith("sim' can't be started (No such file or directory)")


def test_failed_runs_are_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(process, "_KEPT", itertools.count(process._MOST_KEPT - 1))
    kept = tmp_path / "kept"
    program = shell("mkfifo p; echo 5 > log; exit 1", "{input}", keep_failed=kept)
    for _ in range(3):
        failure(program)
    assert len(os.listdir(kept)) == 2
    for folder in kept.iterdir():
        assert sorted(os.listdir(folder)) == ["input.csv", "log", "sbi_dist-failure.txt"]
        assert (folder / "sbi_dist-failure.txt").read_text().endswith("exit code 1\n")


def test_what_is_hard_to_remove_is_removed(tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o500)
    script = 'mkdir -p a/b; touch a/b/c; ln -s "$1" a/d; chmod 000 a/b; chmod 500 a .; echo 1'
    assert shell(script, str(outside))(THETA) == [1]  # see the fixture
    assert outside.stat().st_mode & 0o777 == 0o500


# ---- much input and output -----------------------------------------------------------------------


def test_much_in_and_out_at_a_time() -> None:
    theta = rng().normal(size=(20_000, 3))
    x = Program("cat", stdin="csv", batch=True)(theta)
    np.testing.assert_array_equal(x, theta)
    # Input that nobody reads, and a program that closes it.
    assert shell("exec < /dev/null; for i in $(seq 20000); do echo 1; done", batch=True)(
        theta
    ).shape == (20_000, 1)


def test_endless_printing_takes_no_memory(monkeypatch) -> None:
    tracemalloc.start()
    try:
        script = 'yes said | head -c 20000000; yes no | head -c 20000000 >&2; echo 1 > "$1"'
        assert shell(script, "{output}")(THETA) == [1]
        assert "said | said" in failure(shell("yes said", output="x.csv"), 0.1)
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(process, "_MOST_PRINTED", 100_000)
    assert failure(shell("yes 1")).startswith("error: printed more than 100,000 bytes; write x to")


# ---- time limits and ends ------------------------------------------------------------------------


@pytest.fixture(params=["pidfd", "older kernel"])
def kernel(request, monkeypatch):
    if request.param != "pidfd":

        def missing(pid: int) -> int:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", missing)


@pytest.mark.usefixtures("kernel")
def test_a_time_limit_ends_grandchildren(tmp_path) -> None:
    file = tmp_path / "pids"
    script = 'echo $$ > "$1"; (sleep 60 & echo $! >> "$1"; wait) & echo waiting >&2; wait'
    started = time.monotonic()
    said = failure(shell(script, str(file)), timeout_s=0.2)
    assert said == "timeout: took longer than timeout_s=0.2 s; stderr: waiting"
    assert time.monotonic() - started < 2 and ended(file, 2)
    assert shell("cat > /dev/null; echo 1").run(THETA, rng(), timeout_s=30) == [1]


@pytest.mark.usefixtures("kernel")
def test_a_run_ends_with_its_program(tmp_path) -> None:
    """What it left running neither delays the run, though it holds the pipes, nor stays."""
    file = tmp_path / "pids"
    started = time.monotonic()
    assert shell('sleep 60 & echo $! > "$1"; echo 1', str(file))(THETA) == [1]
    assert time.monotonic() - started < 2 and ended(file, 1)


def test_an_interrupt_ends_the_program(tmp_path) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    file = tmp_path / "pids"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Interrupt):
            shell('echo $$ > "$1"; sleep 60', str(file))(THETA)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended(file, 1)


KILLED = """
import sys
import numpy as np
from sbi_dist.program import Program
script = 'echo $$ >> "$1"; sleep 60 & echo $! >> "$1"; setsid sleep 60 & echo $! >> "$1"; wait'
Program(["sh", "-c", script, "sh", sys.argv[1], "{theta_1}"])(np.zeros(1))
"""


def test_a_killed_process_takes_its_programs_with_it(tmp_path) -> None:
    file = tmp_path / "pids"
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(file)])
    while not file.exists() or len(file.read_text().split()) < 3:
        time.sleep(0.005)
    assert len(os.listdir(tmp_path / "scratch")) == 1
    killed.kill()
    killed.wait()
    assert ended(file, 3)
    for _ in range(1000):  # its scratch directory as well
        if not os.listdir(tmp_path / "scratch"):
            break
        time.sleep(0.005)


def test_the_watcher_is_replaced() -> None:
    program = Program("echo {theta_1}")
    program(THETA)
    watcher = WATCH.watcher
    assert watcher is not None
    watcher.kill()
    watcher.wait()
    assert program(THETA) == [0.1]
    assert WATCH.watcher is not watcher


def test_a_forked_process_has_a_watcher_of_its_own() -> None:
    program = Program("echo {theta_1}")
    program(THETA)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            program(THETA)
            assert WATCH.watcher is not None
            os.kill(os.getpid(), signal.SIGUSR1 if WATCH.running else signal.SIGUSR2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGUSR2
    assert WATCH.watcher is not None and WATCH.watcher.poll() is None


# ---- many at a time ------------------------------------------------------------------------------


def test_threads_do_not_meet(write) -> None:
    """Each run in a folder of its own, and no executable is busy while another thread starts."""
    path = write("sim", '#!/bin/sh\ntest ! -e mark && echo "$1" > mark && cat mark > "$2"\n')
    program = Program(["./sim", "{theta_1}", "{output}"], files=[path])
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: program.run(np.array([i]), rng(i), 30), range(60)))
    assert list(itertools.chain(*results)) == list(range(60))
