"""The body of ``sbi-dist query``: ask a running service, and print or store what it answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from sbi_dist.catalog.options import InferOptions
from sbi_dist.catalog.source import ArraySource, Source, open_catalog
from sbi_dist.errors import InputError, StageError
from sbi_dist.progress import Progress, say
from sbi_dist.serving.client import AsyncClient, Client, Summaries
from sbi_dist.serving.client.exchange import PROMOTED
from sbi_dist.serving.client.file import STANDARD_OUTPUT, AnswerFile

__all__ = ["query"]

# What a table on a terminal shows.
_ROWS = 20
_LEVELS = [0.05, 0.5, 0.95]


def query(
    url: str,
    observations: str | None = None,
    x: str | None = None,
    model: str = PROMOTED,
    num_samples: int = 1000,
    seed: int = 0,
    output: str | None = None,
    summary: bool = False,
    token_file: str | None = None,
    timeout_s: float = 60.0,
) -> str | None:
    """Ask for the posteriors of a file of observations, or of one.

    Args:
        observations: file, see :func:`open_catalog`.
        x: numbers of one observation with commas between them, in place of that.
        output: file for the draws, or for their summaries with ``summary``; None for a table of
            the first observations on standard output.
        url, model, num_samples, seed, token_file, timeout_s: see :class:`Client`.

    Returns:
        What to print on standard output, None where nothing is.
    """
    if (observations is None) == (x is None):
        raise InputError("give --observations FILE, or --x NUMBERS for one observation")
    if output is not None:
        AnswerFile(output, {})  # refuses a file that can't be
    connection: dict[str, Any] = {"token_file": token_file, "timeout_s": timeout_s}
    with Client(url, **connection) as client:
        about = client.model(model)
    _say_model(about)
    shape = tuple(about["x_shape"])
    source: Source
    if observations is not None:
        source = open_catalog(observations, shape)
    else:
        source = ArraySource.of("x", _numbers(str(x), shape))
    # The one that is promoted now, for all that is asked.
    arguments = {"num_samples": num_samples, "seed": seed, "model": about["model"]}

    async def ask() -> str | None:
        async with AsyncClient(url, **connection) as client:
            if output is None:
                return await _table(client, source, about, arguments)
            await _store(client, source, output, summary, about, arguments)
            return None if output == STANDARD_OUTPUT else output

    return _run(ask)


def _run(work: Callable[[], Coroutine[Any, Any, str | None]]) -> str | None:
    """Run a coroutine, which a signal ends in order before the process takes notice of it.

    Raised where a coroutine happens to be, it could be in one that nobody waits for.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(work())
    received: list[int] = []

    async def stoppable() -> str | None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def stop(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in before:
            loop.add_signal_handler(number, stop, number)
        return await work()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        if not received:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    signal.raise_signal(received[0])
    raise KeyboardInterrupt  # where that is ignored


def _say_model(about: dict[str, Any]) -> None:
    verdict = (about.get("calibration") or {}).get("verdict") or "none"
    note = {
        "fail": "it failed its calibration, its posteriors are not to be trusted",
        "warn": "its calibration is in doubt",
        "none": "its calibration was not checked",
    }.get(verdict, "calibrated")
    say(f"query: model {about['model']}, {note}")


def _numbers(x: str, shape: tuple[int, ...]) -> np.ndarray:
    """One observation (1, *shape) as it is given on the command line."""
    try:
        values = np.array([float(each) for each in re.split(r"[,\s]+", x.strip())], np.float32)
    except ValueError as error:
        raise InputError(f"--x is {x!r}; it must be numbers, as in --x 1.0,2.0") from error
    size = math.prod(shape)
    if len(values) != size:
        raise InputError(
            f"--x holds {len(values)} number(s), an observation of the model has shape {shape} "
            f"({size} numbers)"
        )
    if not np.isfinite(values).all():
        raise InputError(f"--x is {x!r}; every number must be finite")
    return values.reshape(1, *shape)


# ---- a file -------------------------------------------------------------------------------------


async def _store(
    client: AsyncClient,
    source: Source,
    output: str,
    summary: bool,
    about: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    usual = InferOptions()
    notes = {"catalog": source.name, "quantiles": list(usual.quantiles), "hdi": usual.hdi}
    notes |= {**arguments, "parameter_names": about["parameter_names"]}
    ask = client.summary_stream if summary else client.sample_stream
    done = 0
    with Progress("query", len(source), "observations") as progress, AnswerFile(output, notes) as f:
        stream: Any = ask(source, **arguments)
        async with contextlib.aclosing(stream) as answers:
            async for answer in answers:
                f.write(answer)
                done += len(answer)
                progress.update(done)
        _say_statuses(dict(f.statuses))


def _say_statuses(statuses: dict[str, int]) -> None:
    """Which observations have no posterior.

    Raises:
        StageError: none has one.
    """
    without = {status: count for status, count in sorted(statuses.items()) if status != "ok"}
    if not without:
        return
    why = ", ".join(f"{count:,} {status}" for status, count in without.items())
    if not statuses.get("ok"):
        raise StageError(
            f"query: none of {sum(without.values()):,} observation(s) has a posterior ({why}); "
            "see the service's log"
        )
    say(f"query: {sum(without.values()):,} observation(s) have no posterior: {why}")


# ---- a table ------------------------------------------------------------------------------------


async def _table(
    client: AsyncClient, source: Source, about: dict[str, Any], arguments: dict[str, Any]
) -> str:
    rows = source.read(0, min(_ROWS, len(source)))
    first = ArraySource(source.name, rows)
    answer = await client.summary(first, **arguments, quantiles=_LEVELS)
    if len(answer) < len(source):
        say(
            f"query: the first {len(answer)} of {len(source):,} observations; give --output "
            "FILE.parquet for all"
        )
    units = about.get("parameter_units") or []
    text = _text(answer, [str(unit or "") for unit in units])
    _say_statuses({status: answer.statuses.count(status) for status in set(answer.statuses)})
    return text


def _text(answer: Summaries, units: list[str]) -> str:
    """A table with a line for each parameter of each observation."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sbi_dist.report.table import format_number

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("observation", "p (out of distribution)", "parameter"):
        table.add_column(name, no_wrap=True)
    for name in ("mean", "sd", *(f"{100 * level:g} %" for level in answer.quantile_levels)):
        table.add_column(name, justify="right", no_wrap=True)
    parameters = [
        f"{name} ({unit})" if unit else name
        for name, unit in zip(
            answer.parameter_names, units or [""] * len(answer.parameter_names), strict=True
        )
    ]
    for row, (name, status) in enumerate(zip(answer.ids, answer.statuses, strict=True)):
        p = float(answer.out_of_distribution_p[row])
        # Text as it is: an identifier may look like markup.
        head = [Text(name), Text("" if math.isnan(p) else f"{p:.2g}")]
        if status != "ok":
            table.add_row(*head, Text(status), end_section=True)
            continue
        for each, parameter in enumerate(parameters):
            sd = float(answer.sd[row, each])
            numbers = (answer.mean[row, each], sd, *answer.quantiles[row, :, each])
            cells = [Text(format_number(float(value), sd)) for value in numbers]
            last = each == len(parameters) - 1
            table.add_row(*head, Text(parameter), *cells, end_section=last)
            head = [Text(""), Text("")]
    # As wide as it needs to be: a narrow terminal must not cut numbers off.
    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(line for line in lines if line)
