"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

__all__ = ["Progress", "say"]


def say(text: str) -> None:
    """One line to the user. On standard error, so that results on standard output stay clean."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as ``12 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    seconds = round(seconds)
    if seconds < 5400:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


class Progress:
    """Count towards a total, with rate, time left and a note.

    Args:
        label: what is done, such as ``simulate``.
        total: number of units; None where it is not known.
        unit: plural of what is counted.
        already: units that were done before, which do not count for the rate.
        enabled: False shows nothing.
    """

    _LINE_EVERY_S = 10.0

    def __init__(
        self, label: str, total: int | None, unit: str, already: int = 0, enabled: bool = True
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._already, self._done, self._note = already, already, ""
        self._enabled = enabled
        self._started = self._last_line = time.monotonic()
        self._bar: object | None = None

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=30),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.label, total=self.total, completed=self._already, note=""
            )
        return self

    def update(self, done: int, note: str = "") -> None:
        """``done`` units in all are done."""
        self._done, self._note = done, note
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self._summary())  # type: ignore[attr-defined]
        elif time.monotonic() - self._last_line >= self._LINE_EVERY_S:
            self._last_line = time.monotonic()
            total = "" if self.total is None else f" of {self.total:,}"
            say(f"{self.label}: {done:,}{total} {self.unit}, {self._summary()}")

    def _summary(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = (self._done - self._already) / elapsed
        parts = [f"{rate:,.3g} {self.unit}/s" if rate < 100 else f"{rate:,.0f} {self.unit}/s"]
        if self._note:
            parts.append(self._note)
        if rate > 0 and self.total is not None and self._done < self.total:
            parts.append(f"{duration((self.total - self._done) / rate)} left")
        return ", ".join(parts)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
        elif self._enabled and error is None:
            elapsed = time.monotonic() - self._started
            say(
                f"{self.label}: {self._done:,} {self.unit} in {duration(elapsed)}, "
                f"{self._summary()}"
            )
