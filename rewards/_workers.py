"""Judging in worker processes that can be killed: the trainer's side of `posttrain.rewards._zygote`.

Signals exist on the main thread only and cannot interrupt a long operation in C, threads cannot be killed, and a child
that is forked from the trainer, or that imports its main module again, holds torch. So a process of its own
(`_zygote`) imports what verifiers need and forks workers, and here a worker that runs over an item's deadline is
killed. Whatever a killed worker had not begun is judged by another: an item costs only itself.

One pool per process, shared by all verifiers and threads, begun with the first completion that needs it and gone with
the process, however that ends. Workers: as many as CPUs that this process may use, shared among the processes that a
launcher has started on the machine; the environment variable POSTTRAIN_REWARD_WORKERS says another number.

A worker has seen model text, so what it says is read as JSON and checked; nothing is ever unpickled.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, get_args

from posttrain import rewards
from posttrain.errors import UserError
from posttrain.rewards import Status, Verdict, Verifier
from posttrain.rewards._zygote import MAX_CONTROL, frame, unframe

SIZE = "POSTTRAIN_REWARD_WORKERS"
CHUNK = 16
"""Items that a worker is given at a time, at most."""
RECYCLE = 2000
"""Items after which a worker is replaced, so that caches do not grow for ever."""
START_WITHIN = 60.0
"""Seconds for the imports of the zygote and for anything asked of it, and for a worker to begin what it was given."""
LAST_BREATH = 0.1
"""Seconds in which a worker that has hung up may end: its sockets close before it has ended."""
MAX_REPLY = 2**20
"""Bytes of a verdict as a worker sends it."""

_KEPT = ("HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "TMPDIR", "TZ")
_STATUSES: dict[str, Status] = {status: status for status in get_args(Status)}


class Unavailable(Exception):
    """There are no workers, and why."""


@dataclass(eq=False)
class _Worker:
    """A worker process, seen from here."""

    zygote: _Zygote
    pid: int
    channel: socket.socket
    knows: int
    """Verifiers that were prepared before it was forked."""
    judged: int = 0
    received: bytearray = field(default_factory=bytearray)

    def give(self, verifier: int, items: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Have items judged.

        Raises:
            OSError: it is gone, or does not listen.
            TypeError, ValueError: a row holds what JSON cannot.
        """
        folder = None
        with contextlib.suppress(OSError):
            folder = os.getcwd()
        self.channel.sendall(frame({"verifier": verifier, "folder": folder, "items": items}))

    def hear(self) -> Iterator[Any]:
        """What it has said, after it has said something; all that came before any nonsense.

        Raises:
            OSError, ValueError: it is gone, or speaks nonsense.
        """
        data = self.channel.recv(2**16)
        if not data:
            raise ConnectionResetError
        self.received += data
        while (message := unframe(self.received, MAX_REPLY)) is not None:
            yield message

    def end(self, patience: float = 0.0) -> int | None:
        """Kill it, unless it ends within `patience` seconds; how it did that (a wait status), None if it did not."""
        self.channel.close()
        try:
            status = self.zygote.ask({"do": "end", "pid": self.pid, "patience": patience})["status"]
        except Unavailable:
            return None
        return status if isinstance(status, int) else None


class _Zygote:
    """The process that workers are forked from.

    Raises:
        Unavailable: it does not start.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prepared: dict[str, int] = {}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        ours.settimeout(START_WITHIN)
        try:
            with theirs:
                self.process = subprocess.Popen(  # noqa: S603 - our own module
                    # -P and the path below: it imports what this process would import, and nothing else.
                    [sys.executable, "-P", "-m", "posttrain.rewards._zygote", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise Unavailable(f"the process that forks workers does not start: {error}") from None
        try:
            self._read()
        except BaseException as error:
            self.process.kill()
            _, said = self.process.communicate()
            ours.close()
            if not isinstance(error, OSError | ValueError):
                raise
            reason = said.decode(errors="replace").strip().splitlines() or [str(error) or type(error).__name__]
            raise Unavailable(f"the process that forks workers does not start: {reason[-1]}") from None
        assert self.process.stderr is not None  # noqa: S101 - a pipe was asked for
        self.process.stderr.close()

    def ask(self, request: Mapping[str, Any], *descriptors: int) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            Unavailable: it could not be done, or nobody is there to do it.
        """
        with self._lock:
            try:
                data = json.dumps(request).encode()
                if len(data) > MAX_CONTROL:
                    raise Unavailable(f"a request of {len(data)} bytes: options may have {MAX_CONTROL}")
                socket.send_fds(self.control, [data], descriptors)
                reply = self._read()
            except Unavailable:
                raise
            except BaseException as error:  # a Ctrl-C as well: what comes next could be the reply to this
                self.control.close()
                if not isinstance(error, OSError | ValueError):
                    raise
                raise Unavailable(f"the process that forks workers is gone ({type(error).__name__})") from None
        if reply["error"] is not None:
            raise Unavailable(str(reply["error"]))
        return reply

    def _read(self) -> dict[str, Any]:
        data = self.control.recv(MAX_CONTROL)
        if not data:
            raise ConnectionResetError("it has ended")
        reply: dict[str, Any] = json.loads(data)
        return reply

    @property
    def lost(self) -> bool:
        """Whether it can no longer be asked."""
        return self.control.fileno() < 0

    def prepare(self, verifier: Verifier) -> int:
        """The number of a verifier, which is built there when it is new.

        Raises:
            Unavailable: it cannot be built.
        """
        options = verifier.options
        values = None if options is None else [*_place(verifier, type(options)), options.model_dump_json()]
        request = {"do": "prepare", "verifier": _place(verifier, type(verifier)), "options": values}
        key = json.dumps(request)
        if key not in self._prepared:
            try:
                self.ask(request)
            except Unavailable as error:
                raise Unavailable(f"the reward '{verifier.name}' cannot be built in a worker: {error}") from None
            self._prepared[key] = len(self._prepared)
        return self._prepared[key]

    def fork(self) -> _Worker:
        """A new worker.

        Raises:
            Unavailable: there can be none.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                pid = self.ask({"do": "fork"}, theirs.fileno())["pid"]
        except BaseException:
            ours.close()
            raise
        ours.settimeout(START_WITHIN)
        return _Worker(self, pid, ours, len(self._prepared))

    def close(self) -> None:
        """End it; it takes its workers along."""
        self.control.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _environment() -> dict[str, str]:
    """What a worker may know: no keys and tokens, no launcher's variables, one thread, and one order of sets."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith("LC_")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**kept, **threads, "PYTHONHASHSEED": "0", "PYTHONPATH": path}


def _place(verifier: Verifier, kind: type) -> list[str]:
    """Module and name of a class.

    Raises:
        UserError: another process could not import it.
    """
    if kind.__module__ == "__main__" or "." in kind.__qualname__:
        raise UserError(
            f"The class {kind.__qualname__} of the reward '{verifier.name}' is defined in "
            f"{'the main module' if kind.__module__ == '__main__' else 'a function or another class'}, from where no "
            "worker process can import it: move it to the top of a module."
        )
    return [kind.__module__, kind.__qualname__]


@dataclass
class _Turn:
    """What a worker is at: the items that it has been given and not answered, and until when it may be silent."""

    items: deque[int]
    until: float
    begun: bool = False
    accused: bool = False
    """Whether it is at the completion itself, and no longer at its row."""


class Pool:
    """Workers, at most `size` at a time. Any thread may use it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._zygote: _Zygote | None = None
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def judge(self, verifier: Verifier, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per completion, in order; each has `verifier.deadline` seconds from when a worker begins it, and
        all of them have until `rewards.until`.

        Raises:
            UserError: the verifier's class cannot be imported by another process.
        """
        items = [
            (completion, {name: row[name] for name in verifier.requires if name in row})
            for completion, row in zip(completions, rows, strict=True)
        ]
        judgement = _Judgement(self, verifier, items)
        try:
            return judgement.finish()
        except Exception:
            judgement.abandon()
            raise
        except BaseException:  # a Ctrl-C, which may have come between any two steps
            self.end_all()
            raise
        finally:
            judgement.selector.close()

    def chunk_of(self, items: int) -> int:
        """Items that a worker is given at a time: not so many that some workers would have none at the end."""
        return max(1, min(CHUNK, items // (2 * self.size)))

    def take(self, verifier: Verifier, *, wait: bool) -> tuple[_Worker, int] | None:
        """A worker that knows the verifier, and the verifier's number; first come, first served.

        None when there is none now and `wait` is false.

        Raises:
            Unavailable: there are no workers.
            UserError: see `judge`.
        """
        ticket = object()
        with self._changed:
            if wait:
                self._queue.append(ticket)
            try:
                if wait:
                    self._changed.wait_for(lambda: self._queue[0] is ticket and self._free())
                elif self._queue or not self._free():
                    return None
                return self._prepared_worker(verifier)
            finally:
                if wait:
                    self._queue.remove(ticket)
                    self._changed.notify_all()

    def _free(self) -> bool:
        return bool(self._idle) or len(self._workers) < self.size

    def _prepared_worker(self, verifier: Verifier) -> tuple[_Worker, int]:
        if self._closed:
            raise Unavailable("the workers have been closed")
        if self._zygote is not None and self._zygote.lost:
            self._discard_zygote()
        for last_try in (False, True):
            if self._zygote is None:
                self._zygote = _Zygote()
            try:
                number = self._zygote.prepare(verifier)
                while self._idle:
                    worker = self._idle.pop()
                    if worker.knows > number:
                        return worker, number
                    self._workers.discard(worker)
                    worker.end()
                worker = self._zygote.fork()
                self._workers.add(worker)
                return worker, number
            except Unavailable:
                if last_try or not self._zygote.lost:
                    raise
                self._discard_zygote()
        raise AssertionError  # the second try returns or raises

    def _discard_zygote(self) -> None:
        """Clear up after a zygote that somebody else has killed; its workers are gone as well."""
        if self._zygote is not None:
            self._zygote.close()
        self._zygote = None
        for worker in self._idle:
            worker.channel.close()
            self._workers.discard(worker)
        self._idle.clear()

    def give_back(self, worker: _Worker) -> None:
        """Let others have a worker that is at nothing."""
        if worker.judged >= RECYCLE:
            self.end(worker)
            return
        with self._changed:
            self._idle.append(worker)
            self._changed.notify_all()

    def end(self, worker: _Worker, patience: float = 0.0) -> int | None:
        """`_Worker.end`, and make room for another."""
        try:
            return worker.end(patience)
        finally:
            with self._changed:
                self._workers.discard(worker)
                self._changed.notify_all()

    def close(self) -> None:
        """End all processes, for good."""
        self._closed = True
        self.end_all()

    def end_all(self) -> None:
        """End all processes. The next completion begins anew; what others are judging is judged again."""
        with self._changed:
            for worker in self._workers:
                worker.channel.close()
            self._workers.clear()
            self._idle.clear()
            zygote, self._zygote = self._zygote, None
        if zygote is not None:
            zygote.close()

    def forget(self) -> None:
        """In a child that was forked: close what belongs to the parent, without a word to it."""
        for worker in self._workers:
            worker.channel.close()
        if self._zygote is not None:
            self._zygote.control.close()
            self._zygote.process.returncode = 0  # not ours to wait for


class _Judgement:
    """The items of one call, on their way through the workers."""

    def __init__(self, pool: Pool, verifier: Verifier, items: list[tuple[str, dict[str, Any]]]) -> None:
        self.pool = pool
        self.verifier = verifier
        self.deadline = verifier.deadline
        self.begun = monotonic()
        self.until = rewards.until.get()
        self.items = items
        self.waiting = deque(range(len(items)))
        self.chunk = pool.chunk_of(len(items))
        self.turns: dict[_Worker, _Turn] = {}
        self.deaths: Counter[int] = Counter()
        self.verdicts: dict[int, Verdict] = {}
        self.selector = selectors.PollSelector()

    def finish(self) -> list[Verdict]:
        """Judge everything."""
        while self.waiting or self.turns:
            if monotonic() > self.until:
                self._give_up()
                break
            self._hand_out()
            if not self.turns:
                continue
            patience = min(self.until, *(turn.until for turn in self.turns.values())) - monotonic()
            # What has been said is heard before anybody is found to be late: this process may have been asleep.
            for key, _ in self.selector.select(max(0.0, patience)):
                self._hear(key.data)
            for worker, turn in list(self.turns.items()):
                if monotonic() > turn.until:
                    self._kill(worker)
        return [self.verdicts[index] for index in range(len(self.items))]

    def _give_up(self) -> None:
        """Nobody waits any longer: what has no verdict gets none."""
        self.abandon()
        late = sum(verdict.status == "timeout" for verdict in self.verdicts.values())
        detail = f"not judged within {self.until - self.begun:.0f} s, in which {late} ran over the deadline"
        for index in range(len(self.items)):
            if index not in self.verdicts:
                self._decide(index, Verdict(None, "verifier_error", detail=detail))

    def abandon(self) -> None:
        """End the workers that are still at something: their answers would be taken for those of the next call."""
        for worker in list(self.turns):
            self._leave(worker)
            self.pool.end(worker)

    def _hand_out(self) -> None:
        while self.waiting:
            try:
                taken = self.pool.take(self.verifier, wait=not self.turns)
            except Unavailable as reason:
                if not self.turns:  # otherwise those that work may do it all
                    while self.waiting:
                        self._decide(self.waiting.popleft(), Verdict(None, "verifier_error", detail=str(reason)))
                return
            if taken is None:
                return
            worker, number = taken
            chosen = deque(self.waiting.popleft() for _ in range(min(self.chunk, len(self.waiting))))
            self.turns[worker] = _Turn(chosen, monotonic() + START_WITHIN)
            self.selector.register(worker.channel, selectors.EVENT_READ, worker)
            try:
                worker.give(number, [self.items[index] for index in chosen])
            except OSError:
                self._lose(worker)
            except (TypeError, ValueError, RecursionError) as error:  # nothing was sent
                self.waiting.extendleft(reversed(self._leave(worker).items))
                self.pool.give_back(worker)
                self._refuse_unsendable(error)

    def _refuse_unsendable(self, error: Exception) -> None:
        for index in list(self.waiting):
            try:
                frame(self.items[index])
            except (TypeError, ValueError, RecursionError):
                self.waiting.remove(index)
                detail = f"the row holds what a worker cannot be sent: {error}"
                self._decide(index, Verdict(None, "verifier_error", detail=detail))

    def _hear(self, worker: _Worker) -> None:
        turn = self.turns[worker]
        try:
            for message in worker.hear():
                turn.until = monotonic() + self.deadline
                if message == [] and not turn.accused:
                    turn.accused = turn.begun or not self.verifier.row_first
                    turn.begun = True
                    continue
                verdict, spent = _read_verdict(message)
                self._decide(turn.items.popleft(), verdict)
                worker.judged += 1
                turn.accused = not self.verifier.row_first
                if spent or not turn.items:
                    self._leave(worker)
                    self.waiting.extendleft(reversed(turn.items))
                    if spent:
                        self.pool.end(worker)
                    else:
                        self.pool.give_back(worker)
                    return
        except OSError:
            self._lose(worker)
        except (ValueError, IndexError):
            self._lose(worker, "it spoke nonsense")

    def _kill(self, worker: _Worker) -> None:
        """A worker is over the deadline."""
        if not self.turns[worker].begun:
            self._lose(worker, f"it did not begin within {START_WITHIN:g} s")
            return
        turn = self._leave(worker)
        self.pool.end(worker)
        self._accuse(turn, Verdict(0.0, "timeout", detail=f"more than {self.deadline:g} s", seconds=self.deadline))
        self.waiting.extendleft(reversed(turn.items))

    def _lose(self, worker: _Worker, cause: str | None = None) -> None:
        """A worker is of no use any more; without a `cause` it has ended by itself. An item is tried twice.

        A worker that the kernel has killed for want of memory says nothing about the completion, whose own limit is far
        below: the trainer beside it may have taken what there was.
        """
        turn = self._leave(worker)
        status = self.pool.end(worker, LAST_BREATH if cause is None else 0.0)
        index = turn.items[0]
        self.deaths[index] += 1
        if self.deaths[index] > 1:
            turn.items.popleft()
            detail = f"two workers were lost: {cause or _cause(status)}"
            self._decide(index, Verdict(None, "verifier_error", detail=detail))
        self.waiting.extendleft(reversed(turn.items))

    def _accuse(self, turn: _Turn, verdict: Verdict) -> None:
        """The item that a worker was killed at, or rather its row, if the worker was still at that."""
        if not turn.accused:
            verdict = replace(verdict, reward=None, status="unparseable_gold", detail=f"the row: {verdict.detail}")
        self._decide(turn.items.popleft(), verdict)

    def _leave(self, worker: _Worker) -> _Turn:
        self.selector.unregister(worker.channel)
        return self.turns.pop(worker)

    def _decide(self, index: int, verdict: Verdict) -> None:
        self.verdicts[index] = verdict


def _cause(status: int | None) -> str:
    """Why a worker has ended whose wait status this is."""
    if status is None:
        return "for no known reason"
    if not os.WIFSIGNALED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    name = signal.Signals(os.WTERMSIG(status)).name
    return f"{name}, probably for want of memory" if name == "SIGKILL" else name  # ours are never asked about


def _read_verdict(message: Any) -> tuple[Verdict, bool]:
    """A worker's answer.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(message, list) or len(message) != 6:
        raise ValueError("no verdict")
    reward, status, answer, detail, seconds, spent = message
    if reward is not None and not (isinstance(reward, int | float) and math.isfinite(reward)):
        raise ValueError("no reward")
    if not isinstance(status, str) or status not in _STATUSES:
        raise ValueError("no status")
    if not isinstance(answer, str | None) or not isinstance(detail, str):
        raise ValueError("no verdict")
    if not isinstance(seconds, float) or not isinstance(spent, bool):
        raise ValueError("no verdict")
    return Verdict(reward if reward is None else float(reward), _STATUSES[status], answer, detail, seconds), spent


_pool: Pool | None = None
_lock = threading.Lock()


def judge(verifier: Verifier, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """`Pool.judge` with this process's pool."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = Pool(size())
        pool = _pool
    return pool.judge(verifier, completions, rows)


def size() -> int:
    """Workers of this process.

    Raises:
        UserError: the environment variable is no positive number.
    """
    given = os.environ.get(SIZE)
    if given is not None:
        if not given.isdecimal() or not int(given):
            raise UserError(f"{SIZE} is '{given}': set it to a number of processes, 1 or more.")
        return int(given)
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(beside) if beside.isdecimal() else 1))


@atexit.register
def close() -> None:
    """End this process's workers; the next completion that needs one begins anew."""
    global _pool
    pool, _pool = _pool, None
    if pool is not None:
        pool.close()


def _in_child() -> None:
    global _pool, _lock
    _lock = threading.Lock()
    pool, _pool = _pool, None
    if pool is not None:
        pool.forget()


os.register_at_fork(after_in_child=_in_child)
