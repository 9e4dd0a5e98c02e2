"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_EVERY_SECONDS = 10.0


class Bar:
    """One bar, as a context manager. `shown=False` (a process other than the first) makes it silent.

    Args:
        label: what is being done, e.g. `sample store`.
        total: units of the whole.
        unit: what is counted, e.g. `prompts`.
    """

    def __init__(self, label: str, total: int, unit: str, *, shown: bool = True) -> None:
        self.label, self.total, self.unit, self.shown = label, total, unit, shown
        self.done = 0
        self.detail = ""
        self._started = self._printed = monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if shown and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=console,
            )
            self._task = self._bar.add_task(label, total=total, detail="")

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shown and kind is None:
            self._print()

    def advance(self, amount: int, detail: str = "") -> None:
        """Count `amount` more units; `detail` replaces the text at the end of the line."""
        self.to(self.done + amount, detail)

    def to(self, done: int, detail: str = "") -> None:
        """Set the number of finished units."""
        self.done = done
        self.detail = detail or self.detail
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=self.detail)
        elif self.shown and monotonic() - self._printed > _EVERY_SECONDS:
            self._print()

    def _print(self) -> None:
        self._printed = monotonic()
        seconds = self._printed - self._started
        line = f"{self.label}  {self.done:,}/{self.total:,} {self.unit}  {seconds:.0f} s  {self.detail}"
        print(line.rstrip(), file=sys.stderr, flush=True)
