"""How a training that runs elsewhere is shown: a panel on a terminal, plain lines elsewhere.

Follows the file that ``live`` writes. It may be replaced at any moment, may come from another
version, and may be out of reach for a while; none of this ends the view.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sbi_dist.errors import InputError, StageError
from sbi_dist.estimation.snapshot import METRICS, Snapshot
from sbi_dist.progress import duration, say
from sbi_dist.store import ObjectStore

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["curve", "describe", "panel", "shown"]

_LINE_EVERY_S = 10.0
_QUIET_AFTER_S = 30.0  # without news, this is told
_WIDEST, _CURVE = 100, 50  # columns
_RANKS_IN_FULL = 6
_LEVELS = "▁▂▃▄▅▆▇█"


@contextlib.contextmanager
def shown(model: ObjectStore, enabled: bool = True, every_s: float = 1.0) -> Iterator[None]:
    """Show how the training into a model's folder stands while the block runs.

    On standard error: a panel where that is a terminal, else a line every ten seconds; one line at
    the end in any case, where anything is known.
    """
    if not enabled:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(_News(model), done, every_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)  # the store may not answer; nobody waits for a view


class _News:
    """The last content of ``metrics.json`` that could be read."""

    def __init__(self, model: ObjectStore) -> None:
        self._model, self._changed = model, time.monotonic()
        self.content: dict[str, Any] = {}

    def look(self) -> None:
        with contextlib.suppress(KeyError, ValueError, InputError, StageError):
            content = json.loads(self._model.get(METRICS))
            if isinstance(content, dict) and not _same(content, self.content):
                self.content, self._changed = content, time.monotonic()

    def quiet_s(self) -> float:
        """Seconds without news, 0 where that is nothing to worry about."""
        quiet = time.monotonic() - self._changed
        return quiet if self.content and quiet >= _QUIET_AFTER_S else 0.0


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return repr(one) == repr(other)  # in which NaN equals itself


def _follow(news: _News, done: threading.Event, every_s: float) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    show = _on_terminal(console) if console.is_terminal else _in_lines()
    with show as update:
        while not done.wait(every_s):
            news.look()
            update(news)
    news.look()
    line = describe(news.content)
    if line:
        say(line)


@contextlib.contextmanager
def _on_terminal(console: Console) -> Iterator[Any]:
    from rich.live import Live
    from rich.spinner import Spinner

    waiting = Spinner("dots", "train: starting workers")
    with Live(waiting, console=console, transient=True, refresh_per_second=4) as live:

        def update(news: _News) -> None:
            if Snapshot.read(news.content) is not None:
                live.update(panel(news.content, news.quiet_s(), not console.options.ascii_only))

        yield update


@contextlib.contextmanager
def _in_lines() -> Iterator[Any]:
    told = [time.monotonic()]

    def update(news: _News) -> None:
        line = describe(news.content, news.quiet_s())
        if line and time.monotonic() - told[0] >= _LINE_EVERY_S:
            told[0] = time.monotonic()
            say(line)

    yield update


# ---- in words -------------------------------------------------------------------------------


def describe(content: dict[str, Any], quiet_s: float = 0.0) -> str:
    """One line about the content of ``metrics.json``; empty where nothing is known yet.

    Args:
        content: the history and, while the training runs, the snapshot.
        quiet_s: seconds since it last changed, where that is long.
    """
    now = Snapshot.read(content)
    if now is None:
        return ""
    parts = [f"train: epoch {now.epoch}"]
    if now.steps and now.seconds_left != 0:
        parts.append(f"step {now.step} of {now.steps}")
    parts += [
        f"validation loss {_loss(now.validation_loss)} "
        f"(best {_loss(now.best_validation_loss)} at {now.best_epoch})",
        f"learning rate {now.learning_rate:.1e}",
        f"{_count(now.simulations_per_second)} simulations/s",
        _duration(now.seconds),
        *([_left(now)] if now.seconds_left else []),
        *_incidents(now),
    ]
    if now.input_wait and max(now.input_wait) >= 0.05:
        parts.append(f"waited for input {_waits(now.input_wait)}")
    if now.note:
        parts.append(_one_line(now.note))
    if quiet_s:
        parts.append(f"no news for {_duration(quiet_s)}")
    return ", ".join(parts)


def _loss(value: float | None) -> str:
    if value is None:
        return "none yet"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    return duration(seconds) if 0 <= seconds < 1e10 else "an unknown time"


def _left(now: Snapshot) -> str:
    assert now.seconds_left is not None
    return f"{'at most ' if now.seconds_left_at_most else ''}{_duration(now.seconds_left)} left"


def _incidents(now: Snapshot) -> list[str]:
    found = ((now.restarts, "restart"), (now.skipped_steps, "skipped step"))
    return [f"{count} {name}{'s' if count > 1 else ''}" for count, name in found if count > 0]


def _waits(fractions: Sequence[float]) -> str:
    if len(fractions) == 1:
        return f"{fractions[0]:.0%}"
    if len(fractions) <= _RANKS_IN_FULL:
        return " ".join(f"{wait:.0%}" for wait in fractions) + " by rank"
    known = {rank: wait for rank, wait in enumerate(fractions) if math.isfinite(wait)}
    if not known:
        return "unknown"
    worst = max(known, key=lambda rank: known[rank])
    mean = math.fsum(wait / len(known) for wait in known.values())
    return f"{mean:.0%} on average, most {known[worst]:.0%} (rank {worst})"


def _one_line(text: str) -> str:
    """As a store's or a library's message may hold anything."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---- in a panel -----------------------------------------------------------------------------


def panel(content: dict[str, Any], quiet_s: float = 0.0, curves: bool = True) -> RenderableType:
    """The content of ``metrics.json`` as a panel, at most 100 columns wide; see ``describe``.

    ``curves=False`` is for terminals that show ASCII only.
    """
    from rich.constrain import Constrain
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    now = Snapshot.read(content) or Snapshot()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(label: str, *parts: str) -> None:
        text = ", ".join(part for part in parts if part)
        if text:
            table.add_row(label, Text(_one_line(text)))

    limit = f" of at most {now.max_epochs}" if now.max_epochs else ""
    row("epoch", f"{now.epoch}{limit}", f"step {now.step} of {now.steps}" if now.steps else "")
    if now.steps > 0:
        done = min(max(now.step, 0), now.steps)
        table.add_row("", ProgressBar(total=now.steps, completed=done, width=40))
    row("training loss", _loss(now.training_loss))
    row(
        "validation loss",
        _loss(now.validation_loss),
        f"best {_loss(now.best_validation_loss)} at epoch {now.best_epoch}",
    )
    losses = content.get("validation_loss")
    if curves and isinstance(losses, list):
        line = curve(losses, _CURVE)
        if line:
            table.add_row("", Text(line, no_wrap=True, overflow="crop"))
    row("learning rate", f"{now.learning_rate:.1e}")
    row("speed", f"{_count(now.simulations_per_second)} simulations/s")
    row("time", _duration(now.seconds), _left(now) if now.seconds_left is not None else "")
    row("input wait", _waits(now.input_wait) if now.input_wait else "")
    row(
        "workers",
        f"{now.workers} on {now.device}" if now.device else f"{now.workers}",
        {"memory": "data in memory", "device": "data on the device"}.get(
            now.data, f"data {now.data}" if now.data else ""
        ),
        *_incidents(now),
    )
    if now.note:
        table.add_row("note", Text(_one_line(now.note), style="yellow"))
    if quiet_s:
        table.add_row("", Text(f"no news for {_duration(quiet_s)}", style="yellow"))
    return Constrain(Panel(table, title="train", title_align="left"), _WIDEST)


def curve(losses: Sequence[Any], width: int) -> str:
    """Losses by epoch as a line of blocks, lowest at the bottom; empty for less than two.

    More epochs than ``width`` are averaged in groups. What is far above the others, as the first
    losses are, is cut off; what is not a finite number is a space.
    """
    groups = min(width, len(losses))
    edges = [len(losses) * group // groups for group in range(groups + 1)] if groups else []
    means: list[float | None] = []
    for low, high in itertools.pairwise(edges):
        known = [
            float(loss)
            for loss in losses[low:high]
            if isinstance(loss, (int, float)) and abs(loss) < 1e100
        ]
        means.append(math.fsum(known) / len(known) if known else None)
    known = [mean for mean in means if mean is not None]
    if len(known) < 2:
        return ""
    lowest = min(known)
    top = min(max(known), lowest + 3 * (statistics.median(known) - lowest))
    if top == lowest:  # so many losses are
        top = max(known)
    height = (top - lowest) or 1.0
    levels = [None if mean is None else (min(mean, top) - lowest) / height for mean in means]
    return "".join(
        " " if level is None else _LEVELS[round(level * (len(_LEVELS) - 1))] for level in levels
    )
