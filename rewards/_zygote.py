"""The process that workers are forked from, and the workers: `python -m posttrain.rewards._zygote CONTROL PARENT`.

It imports what verifiers need once, and then forks a worker in milliseconds whenever it is asked to. It never sees a
completion: those go straight to the workers, over a socket of each worker's own.

Ends: this process when the parent's end of the control socket is closed or the parent is gone; a worker when its socket
is closed or this process is gone (PR_SET_PDEATHSIG). Neither listens to Ctrl-C, and both are in a session of their own.

On all sockets: JSON, on a worker's behind a length of four bytes.

    control   {"do": "prepare", "verifier": [module, class], "options": [module, class, values] or null}   → {"error"}
              {"do": "fork"} with the worker's end of a socket                                      → {"pid", "error"}
              {"do": "end", "pid", "patience"}: killed, unless it ends within so many seconds  → {"status", "error"}
    worker    {"verifier": number, "folder": working directory, "items": [[completion, row], ...]}
              → [] when the first item begins, and whenever one says `completion_begins`;
                → [reward, status, answer, detail, seconds, spent] per item; `spent`: the worker holds so much memory
                  that it should be given no other item
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from posttrain import rewards

MEMORY = 2**30
"""Bytes that a worker may take beside what it was forked with."""
MAX_DETAIL = 2000
"""Characters of a verdict's detail that are sent."""
MAX_ANSWER = 100_000
"""Characters of a verdict's answer that are sent."""
ENDING = 5.0
"""Seconds for a worker that has begun to end: on a busy machine, its sockets close long before it can be waited for."""
MAX_CONTROL = 2**16
"""Bytes of a message on the control socket."""

_LENGTH = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1
_PF_EXITING = 4


def frame(message: Any) -> bytes:
    """A message as it is sent to or by a worker. Lone surrogates and NULs survive."""
    data = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(data)) + data


def unframe(received: bytearray, limit: int) -> Any:
    """The first whole message, taken out of what was received; None when there is none yet.

    Raises:
        ValueError: it is longer than `limit` bytes, or no JSON, or null.
    """
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if length > limit:
        raise ValueError(f"a message of {length} bytes")
    end = _LENGTH.size + length
    if len(received) < end:
        return None
    try:
        message = json.loads(received[_LENGTH.size : end])
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if message is None:
        raise ValueError("null")
    del received[:end]
    return message


def main() -> None:
    """Serve the control socket until the parent is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    parent = int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    verifiers: list[rewards.Verifier] = []
    workers: set[int] = set()
    dying: set[int] = set()
    gone: list[int] = []
    # A child that the parent has forked may hold the parent's end open for longer than the parent lives.
    with contextlib.suppress(OSError):
        gone = [os.pidfd_open(parent)]
    waiting = select.poll()
    for descriptor in (control.fileno(), *gone):
        waiting.register(descriptor, select.POLLIN)
    control.send(json.dumps({"error": None}).encode())
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 2)
    os.close(silence)
    while os.getppid() == parent:
        ready = [descriptor for descriptor, _ in waiting.poll(None if gone else 1000)]
        if control.fileno() not in ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(control, MAX_CONTROL, 1)
        if not data:
            break
        reply: dict[str, Any] = {"error": None}
        try:
            request = json.loads(data)
            _reap(dying)
            if request["do"] == "prepare":
                verifiers.append(_build(request))
                verifiers[-1].prepare()
                gc.collect()
                gc.freeze()  # so that a worker's collector does not touch, and copy, what it shares with this process
            elif request["do"] == "fork":
                reply["pid"] = _fork(control, descriptors.pop(), verifiers)
                workers.add(reply["pid"])
            else:
                workers.remove(request["pid"])  # once: then another process may have the number
                reply["status"] = _end(request["pid"], request["patience"], dying)
        except Exception as error:
            reply["error"] = f"{type(error).__name__}: {error}"[:MAX_DETAIL]
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps(reply).encode())
    for pid in workers:
        _end(pid, 0.0, dying)


def _build(request: Mapping[str, Any]) -> rewards.Verifier:
    module, name = request["verifier"]
    kind = getattr(importlib.import_module(module), name)
    if request["options"] is None:
        return kind()  # type: ignore[no-any-return]
    options_module, options_name, values = request["options"]
    options = getattr(importlib.import_module(options_module), options_name).model_validate_json(values)
    return kind(options)  # type: ignore[no-any-return]


def _end(pid: int, patience: float, dying: set[int]) -> int | None:
    """Kill a worker and what it has started: its wait status, or None if it did not end by itself within `patience`.

    One that is ending already may take longer; one that does not even die when it is killed is put to the `dying`.
    """
    begun = time.monotonic()
    while not (ended := _has_ended(pid)):
        passed = time.monotonic() - begun
        if passed >= patience and not (patience > 0 and passed < ENDING and _is_ending(pid)):
            break
        time.sleep(0.001)
    for kill in (os.killpg, os.kill):  # what it started as well; it may not have a group of its own yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    for pause in (0.0, *[0.001] * 20, *[0.01] * 98):
        time.sleep(pause)
        waited, status = os.waitpid(pid, os.WNOHANG)
        if waited:
            return status if ended else None
    dying.add(pid)
    return None


def _reap(dying: set[int]) -> None:
    """Let go of those that have ended meanwhile."""
    for pid in list(dying):
        if os.waitpid(pid, os.WNOHANG)[0]:
            dying.discard(pid)


def _is_ending(pid: int) -> bool:
    """Whether the kernel is taking a process apart."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return bool(int(file.read().rpartition(b")")[2].split()[6]) & _PF_EXITING)
    except (OSError, IndexError, ValueError):
        return False


def _has_ended(pid: int) -> bool:
    """Whether a child has ended, of which `waitpid` can still say how."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _fork(control: socket.socket, descriptor: int, verifiers: list[rewards.Verifier]) -> int:
    """A new worker that talks over `descriptor`; its pid."""
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    try:
        control.close()
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == zygote:
            _limit()
            rewards.in_worker = True
            _work(socket.socket(fileno=descriptor), verifiers)
    finally:
        os._exit(1)


def _limit() -> None:
    """Bound the memory, leave no core file, and be the first to go when the machine runs out of memory."""
    for kind, wanted in ((resource.RLIMIT_AS, _mapped() + MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(kind, (wanted, wanted))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _mapped() -> int:
    """Bytes of address space in use, which is what RLIMIT_AS bounds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _work(channel: socket.socket, verifiers: list[rewards.Verifier]) -> NoReturn:
    """Judge what comes over the channel until it is closed."""
    received = bytearray()
    full = _mapped() + MEMORY // 2
    while True:
        request = unframe(received, 2**32)
        if request is None:
            data = channel.recv(2**20)
            if not data:
                os._exit(0)
            received += data
            continue
        with contextlib.suppress(OSError, TypeError):
            os.chdir(request["folder"])
        rewards.completion_begins = lambda: channel.sendall(frame([]))
        verifier = verifiers[request["verifier"]]
        channel.sendall(frame([]))
        for completion, row in request["items"]:
            spent = False
            try:
                found = verifier.attempt(completion, row)
            except MemoryError:
                found = rewards.Verdict(0.0, "resource", detail="more memory than a worker may take")
                spent = True
            spent = spent or _mapped() > full
            answer = found.answer if found.answer is None else found.answer[:MAX_ANSWER]
            detail = found.detail[:MAX_DETAIL]
            channel.sendall(frame([found.reward, found.status, answer, detail, found.seconds, spent]))


if __name__ == "__main__":
    main()
