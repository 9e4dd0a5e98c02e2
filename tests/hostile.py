"""Verifiers that do what they must not, for tests of worker processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from posttrain import rewards
from posttrain.rewards import Deadline, RewardOptions, Verdict, Verifier


class Options(RewardOptions):
    """A deadline that tests can wait for."""

    deadline: Deadline = 0.5
    start: str = ""
    """What to do when the workers' parent builds it."""


class Hostile(Verifier):
    """A completion is a word, which says what happens: see `verify`."""

    name = "hostile"
    isolated = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def prepare(self) -> None:
        """Fail, or die, when the options say so."""
        if self.options.start == "fail":
            raise RuntimeError("not today")
        if self.options.start == "die":
            os._exit(3)

    def decide(self, completion: str, row: Mapping[str, Any]) -> Verdict | None:
        """Some are decided in the calling process."""
        return Verdict(1.0, "ok", str(os.getpid())) if completion == "at once" else None

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Do as the completion says; any other word is an echo of the word and the row."""
        word, _, argument = completion.partition(" ")
        if word == "sleep":
            time.sleep(float(argument))
        elif word == "loop":
            while True:
                pass
        elif word == "power":  # one operation in C, which no signal interrupts
            len(str(7 ** (7**9)))
        elif word == "deaf":
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            time.sleep(60)
        elif word == "memory":
            _ = [bytearray(2**24) for _ in range(2**12)]
        elif word == "hoard":
            kept.append(bytearray(700 * 2**20))
        elif word == "kill":
            os.kill(os.getpid(), getattr(signal, argument))
        elif word == "exit":
            os._exit(int(argument))
        elif word == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif word == "segfault":
            ctypes.string_at(0)
        elif word == "raise":
            raise ValueError(argument)
        elif word == "recurse":
            self.verify(completion, row)
        elif word == "thread":
            threading.Thread(target=time.sleep, args=(60,)).start()
        elif word == "close":
            os.closerange(3, 100)
        elif word == "linger":  # hangs up, and lives on
            os.closerange(3, 100)
            time.sleep(60)
        elif word == "nonsense":
            os.write(channel(), b"\0\0\0\2{}")
        elif word == "long":
            os.write(channel(), b"\xff\xff\xff\xff")
        elif word == "bytes":
            os.write(channel(), b"\0\0\0\4\x80\x05N.")  # a pickle
        elif word == "drip":
            while True:
                os.write(channel(), b"\0")
                time.sleep(0.05)
        elif word == "environment":
            return Verdict(1.0, "ok", ",".join(sorted(os.environ)))
        elif word == "modules":
            return Verdict(1.0, "ok", str(argument in sys.modules))
        elif word == "who":
            return Verdict(1.0, "ok", f"{os.getpid()} {os.getppid()} {os.getpgid(0)}")
        elif word == "nested":
            return self.score(["who"], [row])[0]
        elif word == "folder":
            return Verdict(1.0, "ok", os.getcwd())
        elif word == "large":
            return Verdict(0.5, "wrong", "a" * int(argument), "d" * 10_000)
        return Verdict(1.0, "ok", completion, repr(dict(row)))


class Needs(Hostile):
    """Has a column."""

    requires = ("column",)


class RowFirst(Hostile):
    """Does what the row says before what the completion says."""

    requires = ("row",)
    row_first = True

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """As `Hostile`, for the one and then the other."""
        super().verify(row["row"], {})
        rewards.completion_begins()
        return super().verify(completion, {})


class Plain(Verifier):
    """An isolated verifier without options."""

    name = "plain"
    isolated = True

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Say in which process."""
        return Verdict(1.0, "ok", str(os.getpid()))


class Strange(RewardOptions):
    """Options without a deadline."""

    several: tuple[int, ...] = (1, 2)


class Local(Plain):
    """Options that JSON holds in another form."""

    def __init__(self, options: Strange) -> None:
        self.options = options

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Repeat the options."""
        return Verdict(1.0, "ok", repr(self.options.several))


def hangs(text: str) -> bool:
    """Whether a completion, or a row's text, is one that does not end by itself."""
    return text in ("loop", "power", "deaf", "stop", "sleep 60")


def channel() -> int:
    """The worker's own socket, found among its open files."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                return int(name)
    raise LookupError("no socket")


kept: list[bytearray] = []
