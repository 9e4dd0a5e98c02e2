"""Time on a busy machine: only what is meant to be late is held to its deadline, and work is counted, not waited for.

A worker that the machine leaves waiting for seconds is late as well, and its item would be accused: that is so in a
run, and in a test it says nothing.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from posttrain.rewards import _suites, _workers, code

GRACE = 100.0
"""Seconds beyond its deadline that an item may take which is not meant to be late."""
LATE = "# late"
"""In a program that is meant to be stopped at its deadline."""
SOON = 30.0
"""Seconds within which a busy machine does what takes a moment; what hangs in a test hangs for longer."""


def patient(hangs: Callable[[str], bool]) -> type[_workers._Judgement]:
    """A judgement that holds to its deadline only an item whose completion hangs, or whose column `row` does.

    It is put in the place of `_workers._Judgement`.
    """

    class Patient(_workers._Judgement):
        def _hear(self, worker: _workers._Worker) -> None:
            before = self.turns[worker].until
            super()._hear(worker)
            turn = self.turns.get(worker)
            if turn is not None and turn.until != before:
                completion, row = self.items[turn.items[0]]
                if not hangs(completion if turn.accused else str(row.get("row", ""))):
                    turn.until += GRACE

    return Patient


class Unhurried(code.Reward):
    """Holds to the deadlines of its options only a program that says LATE."""

    def _run_here(self, program: str, suite: _suites.Suite) -> Any:
        if LATE in program:
            return super()._run_here(program, suite)
        other = copy.copy(self)
        more = {name: getattr(self.options, name) + GRACE - SOON for name in ("timeout", "deadline")}
        other.options = self.options.model_copy(update=more)
        return super(Unhurried, other)._run_here(program, suite)


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Where programs run, and those that judge them, are patient with all that is not LATE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_workers, "_Judgement", patient(lambda text: LATE in text))
        patch.setattr(code, "Reward", Unhurried)
        yield


def eventually(condition: Callable[[], bool], seconds: float = 2 * SOON) -> bool:
    """Whether something comes about."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    """Whether a process has ended, if nobody has asked yet how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def worked() -> float:
    """Seconds that processors have worked for this process and its children so far, those that have ended included.

    Other work on the machine does not move it.
    """
    me = psutil.Process()
    seconds = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            seconds += sum(process.cpu_times()[:4])  # of its own and of its children that it has waited for
    return seconds
