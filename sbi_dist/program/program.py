"""The class ``Program``: what its arguments must be together, and a run.

Each argument by itself is in ``arguments.py``; how parameters and x are written and read is in
``formats.py``, how a process is handled in ``process.py``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sbi_dist.errors import InputError
from sbi_dist.program import arguments, formats
from sbi_dist.program.process import ProgramFailed, execute, scratch_directory, write_file

__all__ = ["Program"]

_IN_CODE = (
    "parameter_names batch stdin input_format output output_format columns environment "
    "success_codes"
).split()

# A program on one core each: as many run at a time as there are cores.
_THREADS = [
    f"{library}_NUM_THREADS"
    for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR", "RAYON", "JULIA")
]


class Program:
    """A simulator that is a program: a callable ``program(theta, rng=...)`` that gives x.

    ::

        simulator = Program(
            "./decay --rate={rate} --amplitude={amplitude} --seed={seed} {output}",
            parameter_names=["rate", "amplitude"],
            files=["decay"],
            base=__file__,
        )
        problem = Problem(prior, simulator, ["rate", "amplitude"])

    A program that takes and gives a table of many rows; and one that is fed JSON and prints it::

        Program("Rscript decay.R {input} {output} {seed}", files=["decay.R"], batch=True)
        Program("julia decay.jl", files=["decay.jl"], stdin="json",
                output_format="json", columns=["fit.mean", "fit.sd"])

    Each run has a process and an empty scratch directory of its own, which is the program's
    working directory and is removed afterwards. A program that draws random numbers must take
    its seed from ``{seed}`` (or from the JSON document); otherwise its rows can't be reproduced.
    OMP_NUM_THREADS and its like are 1 unless they are set. A run ends with its program: what that
    left running is killed, and so is the program when this process ends, however it ends.

    **Parameters** get to the program by any of: placeholders ``{name}`` in the command, the file
    ``{input}``, or its standard input (``stdin``). The formats of the latter two are

    - ``csv``: a header with the names, then one line for each parameter vector;
    - ``json``: ``{"theta": [...], "parameters": {name: value}, "seed": n}``, with ``batch`` lists
      of N vectors and of N values;
    - ``npy``: float64 of shape (D,), with ``batch`` (N, D);
    - ``parquet``: one float64 column for each parameter.

    **x** is read from ``{output}``, else from the file ``output``, else from standard output:

    - ``csv`` (also .txt, .dat, .tsv): numbers with commas, tabs or spaces between, with or
      without a header; lines that start with # are left out; an empty value, ``NA`` or ``nan`` is
      NaN. A table of one row or one column gives a vector, another one an array (rows, columns).
    - ``parquet``: as csv; a column of lists is taken too.
    - ``npy`` and ``json`` (a number, or nested lists): the shape that they have.

    With ``batch``, the first length of x must be N; a table has one row for each parameter vector
    and gives (N, columns).

    Args:
        command: the program and its arguments; no shell is involved. One string is split as a
            shell would. The program is a name to be found on the PATH, an absolute path, or one
            of ``files``; it must be on this machine too, where the simulator's form is found by
            running it. Placeholders in the arguments: ``{name}`` of a parameter (written such
            that no digit of a float64 is lost), ``{seed}`` (0 <= seed < 2**31), ``{input}``,
            ``{output}`` and ``{scratch}`` (absolute paths) and ``{rows}`` (N). ``{{`` and ``}}``
            are braces.
        parameter_names: D names; default theta_1, theta_2, ...
        batch: one run takes N parameter vectors and gives N rows.
        stdin: format of the parameters on standard input; None leaves it empty.
        input_format: format of the file ``{input}``, which is named ``input.<format>``.
        output: path, relative to the scratch directory, of the file with x.
        output_format: format of x; default by the file's ending, csv for standard output.
        columns: which part of x to take: names of columns, or their numbers from 0 (csv,
            parquet), or keys of a JSON document, with dots between levels (``fit.mean``). Several
            keys become the last axis of x.
        files: files whose content is read now, travels with the simulator, and lies in each
            scratch directory: with its relative path, or an absolute path's last name.
        base: folder that ``files`` are relative to, or a file in it, such as ``__file__``;
            default the current directory.
        environment: variables to add to the environment.
        success_codes: exit codes of a run that went well.
        scratch: folder of the scratch directories, made where missing; default that of
            ``tempfile``, which ``TMPDIR`` sets. The program's own TMPDIR is its scratch directory.
        keep_failed: folder that keeps the scratch directories of failed runs, at most 10 of a
            process.

    Attributes:
        batch, command, parameter_names: as given; ``command`` as a tuple.

    Raises:
        InputError: names the argument and what is allowed.
    """

    def __init__(
        self,
        command: str | Sequence[str | os.PathLike[str]],
        *,
        parameter_names: Sequence[str] | None = None,
        batch: bool = False,
        stdin: str | None = None,
        input_format: str = "csv",
        output: str | None = None,
        output_format: str | None = None,
        columns: str | int | Sequence[str | int] | None = None,
        files: Iterable[str | os.PathLike[str]] = (),
        base: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
        success_codes: int | Iterable[int] = (0,),
        scratch: str | os.PathLike[str] | None = None,
        keep_failed: str | os.PathLike[str] | None = None,
    ) -> None:
        self.command = arguments.command_words(command)
        self.parameter_names = arguments.checked_names(parameter_names)
        self.batch = bool(batch)
        self.stdin, self.input_format = stdin, input_format
        if stdin is not None:
            formats.check_format("stdin", stdin)
        formats.check_format("input_format", input_format)
        used = self._check_placeholders()

        self.output = None if output is None else arguments.path_inside("output", output)
        self.output_format = output_format or formats.format_of(self.output)
        formats.check_format("output_format", self.output_format)
        if self.output is None and "output" in used:
            self.output = f"output.{self.output_format}"
        self.columns = formats.check_columns(columns, self.output_format)

        folder = Path.cwd() if base is None else Path(base).expanduser().absolute()
        folder = folder.parent if folder.is_file() else folder
        read = arguments.read_files(files, folder)
        self._input = f"input.{input_format}" if "input" in used else None
        names = [name for name in (self._input, self.output) if name] + [name for name, *_ in read]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"program: {name!r} is the name of more than one of the input, the output and "
                    "files; give one another name"
                )
        self._files = {name: (content, executable) for name, content, executable in read}

        self.environment = {str(key): str(value) for key, value in (environment or {}).items()}
        codes = {success_codes} if isinstance(success_codes, int) else {*success_codes}
        if not codes or not codes <= {*range(256)}:
            raise InputError(
                f"program.success_codes is {success_codes!r}; it must be a list of exit codes "
                "from 0 to 255"
            )
        self.success_codes = tuple(sorted(codes))
        self._program = self._find_program()
        self._scratch, self._keep_failed = (
            None if path is None else str(Path(path).expanduser().absolute())
            for path in (scratch, keep_failed)
        )

    def _check_placeholders(self) -> set[str]:
        """The placeholders of the command; unknown ones, or no way for theta, are an error."""
        used = {name for word in self.command for name in arguments.placeholders(word)}
        parameters = used - {*arguments.RESERVED}
        known = self.parameter_names or ("theta_1", "theta_2")
        for name in sorted(parameters - {*known}):
            if self.parameter_names is None and re.fullmatch(r"theta_[1-9]\d*", name):
                continue
            allowed = [*known, *arguments.RESERVED]
            raise InputError(
                f"program.command has the placeholder {{{name}}}, but there are "
                f"{', '.join(allowed)}{formats.did_you_mean(name, allowed)}; names are given by "
                "parameter_names=[...], and braces themselves are written {{ and }}"
            )
        if self.batch and parameters:
            raise InputError(
                f"program.command has the placeholder {{{min(parameters)}}}, which has no single "
                "value with batch=True; use {input} or stdin='csv' instead"
            )
        if not parameters and "input" not in used and self.stdin is None:
            raise InputError(
                "program.command passes no parameters to the program; use placeholders such as "
                f"{{{known[0]}}}, or {{input}} for a file, or stdin='csv'"
            )
        return used

    def _find_program(self) -> str | None:
        """The name among ``files`` of the program, or None where it is one of the machine's."""
        word = self.command[0]
        name = str(PurePosixPath(word))
        if name in self._files:
            self._files[name] = (self._files[name][0], True)
            return name
        relative = "/" in word and not os.path.isabs(word)
        if relative or self._which() is None:
            raise InputError(
                f"program.command begins with {word!r}, which is neither one of files"
                f"{formats.did_you_mean(name, self._files)}, nor a program on the PATH, nor the "
                "absolute path of an executable file on this machine"
            )
        return None

    def _which(self) -> str | None:
        return shutil.which(self.command[0], path=self._environment().get("PATH"))

    def _environment(self) -> dict[str, str]:
        return {**dict.fromkeys(_THREADS, "1"), **os.environ, **self.environment}

    def code(self) -> dict[str, Any]:
        """What determines x: JSON-ready, and the same on machines with other paths.

        The command, formats, columns, variables, and the digests of ``files``, of arguments that
        are absolute paths of files, and of the program itself unless it is one of the system or
        of the Python environment, which counts by its name. What these read or start in turn is
        not seen: give it in ``files``, or a ``version`` to the problem.
        """
        found = None if self._program else self._which()
        system = found is None or arguments.of_the_system(found)
        first = PurePosixPath(self.command[0]).name if system else arguments.identity_of(str(found))
        return {
            "command": [self._program or first, *map(arguments.identity_of, self.command[1:])],
            **{name: getattr(self, name) for name in _IN_CODE},
            "files": {
                name: [hashlib.sha256(content).hexdigest(), executable]
                for name, (content, executable) in sorted(self._files.items())
            },
        }

    def __repr__(self) -> str:
        return f"Program({' '.join(self.command)!r})"

    def __call__(self, theta: Any, rng: np.random.Generator | None = None) -> np.ndarray:
        """Run the program without a time limit; see :meth:`run`."""
        return self.run(theta, rng)

    def run(
        self, theta: Any, rng: np.random.Generator | None = None, timeout_s: float | None = None
    ) -> np.ndarray:
        """Run the program once.

        Args:
            theta: the parameters, real numbers of shape (D,), with ``batch`` (N, D).
            rng: the integer seed is drawn from it; None for a seed from the system.
            timeout_s: longest that the program may take, in seconds; None for no limit.

        Returns:
            x of a shape described above; float64, for npy the dtype of the file.

        Raises:
            ProgramTimeout: it took too long.
            ProgramCrashed: a signal ended it.
            ProgramFailed: it could not be started, its exit code is no success, or there is no
                x that can be read.
            ValueError: theta has the wrong shape.
        """
        theta = np.asarray(theta, dtype=np.float64)
        if theta.ndim != (2 if self.batch else 1):
            raise ValueError(
                f"theta has shape {theta.shape}; a program with batch={self.batch} takes "
                f"{'(N, D)' if self.batch else '(D,)'}"
            )
        names = self.parameter_names or [f"theta_{i + 1}" for i in range(theta.shape[-1])]
        if len(names) != theta.shape[-1]:
            raise ValueError(
                f"theta has {theta.shape[-1]} parameters, but program.parameter_names has "
                f"{len(names)}"
            )
        rows = len(theta) if self.batch else None
        seed = int((np.random.default_rng() if rng is None else rng).integers(2**31))
        about = shlex.join(self.command)
        with scratch_directory(self._scratch, self._keep_failed, about) as scratch:
            words = {
                "seed": str(seed),
                "scratch": scratch,
                "input": f"{scratch}/{self._input}",
                "output": f"{scratch}/{self.output}",
                "rows": str(rows or 1),
            }
            if not self.batch:
                words |= zip(names, map(repr, theta.tolist()), strict=True)
            command = [arguments.filled(word, words) for word in self.command]

            for name, (content, executable) in self._files.items():
                write_file(f"{scratch}/{name}", content, executable)
            if self._input is not None:
                write_file(words["input"], formats.encode(self.input_format, theta, names, seed))
            if self.output is not None:
                os.makedirs(os.path.dirname(words["output"]), exist_ok=True)
            if self._program is not None:
                command[0] = f"{scratch}/{self._program}"
            printed, said = execute(
                command,
                scratch,
                {**self._environment(), "TMPDIR": scratch, **self.environment},
                feed=None if self.stdin is None else formats.encode(self.stdin, theta, names, seed),
                prints_x=self.output is None,
                timeout_s=timeout_s,
                success_codes=self.success_codes,
            )
            try:
                data = printed if self.output is None else formats.result_of(words["output"])
                return formats.read_x(self.output_format, data, self.columns, rows)
            except formats.Unreadable as error:
                where = self.output or "standard output"
                raise ProgramFailed(f"{where}{error}{said}") from None
