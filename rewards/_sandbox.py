"""Running a program that a model wrote: which isolation this machine has, and a handle on one program at a time.

Isolation comes in *tiers*, the first that holds is taken:

- `bubblewrap`: the program `bwrap` makes namespaces and a file system of read-only libraries;
- `unshare`: the same by system calls, for root or where the kernel gives user namespaces to everybody;
- `landlock`: Landlock and seccomp, which need no privilege; there is no writable folder, a program can tell which files
  are there and how large they are, and a thread bomb is bounded more loosely where this is neither root nor can have a
  number of its own;
- `none`: limits and a clean environment, nothing else; never taken unless it is named.

The first two add Landlock and seccomp where the kernel has them, so that a program may do the same in all tiers and a
verdict does not depend on the machine: compute, use threads, and in the first two write up to 16 MiB in its own /tmp.

A tier counts as there when the *self-test* says so: programs that attack, run in it. What runs inside is `_runner`; a
program is never in the memory of this process, and what it says is read as JSON and checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from time import monotonic, perf_counter
from typing import Any, Literal, get_args

from posttrain.errors import UserError
from posttrain.rewards import _runner
from posttrain.rewards._zygote import frame, unframe

Tier = Literal["bubblewrap", "unshare", "landlock", "none"]
TIERS: tuple[Tier, ...] = get_args(Tier)[:3]
"""Those that isolate, best first."""

MAX_OUTPUT = 2**20
"""Bytes that a program may print."""
START_WITHIN = 30.0
"""Seconds for the server's imports."""
BREATH = 0.5
"""Seconds that a killed program may take to be gone."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    memory: int = 512 * 2**20
    """Bytes of address space, Python's own included."""
    cpu: int = 4
    """Seconds of CPU time."""
    processes: int = 24
    """Processes and threads of its user."""
    file: int = 8 * 2**20
    """Bytes of one file."""
    files: int = 64
    """Open files."""
    folder: int = 16 * 2**20
    """Bytes in its /tmp."""
    seccomp: bool = True
    """Off in tests of the other layers only."""
    landlock: int = 99
    """Its newest version that is used; lower, and 0 for none, in tests only."""


class Unavailable(Exception):
    """The sandbox failed, and why: no fault of the program."""


class Stopped(Exception):
    """A program came to an end before it had answered: `status` is what that means, the text says more.

    `raised` are the built-in class of the exception and its arguments, as plain data, where it was one.
    """

    def __init__(
        self, status: Literal["wrong", "timeout", "resource"], reason: str, raised: tuple[str, list[Any]] | None = None
    ) -> None:
        super().__init__(reason)
        self.status: Literal["wrong", "timeout", "resource"] = status
        self.raised = raised


class Sandbox:
    """One tier, ready to start programs, several at a time. Any thread may use it.

    Raises:
        Unavailable: its server does not start.
    """

    def __init__(self, tier: Tier, limits: Limits | None = None) -> None:
        self.tier, self.limits = tier, limits or Limits()
        settings: dict[str, Any] = {"tier": tier, "user": None, **asdict(self.limits)}
        if tier == "bubblewrap":
            program = shutil.which("bwrap")
            if program is None:
                raise Unavailable("there is no program bwrap")
            settings.update(program=program, sized=_has_size(program))
        try:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise Unavailable(f"no socket: {error}") from None
        self._owner = os.getpid()
        with theirs:
            command = [os.path.realpath(sys.executable), "-P", "-s", "-S", _runner.__file__, "serve"]
            try:
                self._process = subprocess.Popen(  # noqa: S603 - our own file
                    [*command, json.dumps(settings), str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:
                self._control.close()
                raise Unavailable(f"the sandbox's server does not start: {error}") from None
        self._control.settimeout(START_WITHIN)
        try:
            ready = self._control.recv(16)
        except OSError:
            ready = b""
        if ready != b"ready":
            self.close()
            raise Unavailable("the sandbox's server does not start")

    def start(
        self, source: str, function: str | None, stdin: bytes, seconds: float, deadline: float, *, asks: bool = False
    ) -> Program:
        """Start a program, which may take so many seconds from when its sandbox is ready.

        Args:
            deadline: a time of `monotonic` beyond which it does not run, and the sandbox need not become ready.
            asks: it does not define `function` but calls it (`Program.asked`).

        Raises:
            Unavailable: the sandbox failed.
        """
        return Program(self, source, function, stdin, seconds, deadline, asks=asks)

    def run(self, source: str, stdin: bytes, seconds: float, deadline: float | None = None) -> bytes:
        """What a program prints when it reads `stdin`.

        Raises:
            Stopped: it did not come to its end as it should.
            Unavailable: the sandbox failed.
        """
        until = monotonic() + seconds + START_WITHIN if deadline is None else deadline
        with self.start(source, None, stdin, seconds, until) as program:
            return program.output()

    def send(self, *descriptors: int) -> None:
        """Hand four descriptors to the server.

        Raises:
            Unavailable: it is gone.
        """
        try:
            socket.send_fds(self._control, [b"run"], descriptors)
        except OSError as error:
            raise Unavailable(f"the sandbox's server is gone ({error})") from None

    def close(self) -> None:
        """End the server; a program that runs is ended by its own handle."""
        self._control.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Program:
    """A program that runs; on leaving, it and all that it has started are gone.

    Raises:
        Unavailable: the sandbox failed.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        source: str,
        function: str | None,
        stdin: bytes,
        seconds: float,
        deadline: float,
        *,
        asks: bool = False,
    ) -> None:
        self._limits = sandbox.limits
        self._longest = _runner.MAX_CALL if asks else 2 * _runner.MAX_ANSWER
        self._deadline, self._began = deadline, monotonic()
        self._received, self._printed = bytearray(), bytearray()
        self._report: dict[str, Any] | None = None
        self._complaint: tuple[str, str] | None = None
        self._raised: tuple[str, list[Any]] | None = None
        with contextlib.ExitStack() as opened:
            try:
                self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                opened.callback(control.close)
                self._data, data = socket.socketpair()
                opened.callback(data.close)
                self._output, output = os.pipe()
                opened.callback(os.close, output)
                if function is None:
                    given = os.memfd_create("stdin")
                    opened.callback(os.close, given)
                    with os.fdopen(os.dup(given), "wb") as file:
                        file.write(stdin)
                    os.lseek(given, 0, os.SEEK_SET)
                else:
                    given = os.open(os.devnull, os.O_RDONLY)
                    opened.callback(os.close, given)
                os.set_blocking(self._output, False)
                sandbox.send(control.fileno(), data.fileno(), given, output)
            except OSError as error:
                raise Unavailable(f"no descriptors: {error}") from None
        try:
            first = self._hear()
            if not isinstance(first, dict) or "ready" not in first:
                raise Unavailable(str(first.get("broken") if isinstance(first, dict) else first))
            self.allow(seconds, deadline)
            self._say({"source": source, "function": function, "asks": asks})
        except Stopped as stopped:  # nothing of the program has run: it is the machine that took so long
            self.close()
            raise Unavailable(f"the sandbox did not begin: {self._said() or stopped}") from None
        except BaseException:
            self.close()
            raise

    def allow(self, seconds: float, deadline: float) -> None:
        """Let it run for so many seconds from now, and not beyond the deadline."""
        self._began = monotonic()
        self._deadline = min(deadline, self._began + seconds)

    def loaded(self) -> None:
        """Wait until the program has defined its function.

        Raises:
            Stopped: it does not.
        """
        self._answer("loaded")

    def call(self, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        """What its function returns, as plain data.

        Raises:
            Stopped: nothing, or nothing plain. When the status is `wrong`, the program may still answer other calls.
        """
        held = {name: _runner.encode(value) for name, value in kwargs.items()}
        self._say({"args": _runner.encode(list(args)), "kwargs": held})
        form = self._answer("value")
        try:
            return _runner.decode(form)
        except (ValueError, TypeError, RecursionError) as error:
            raise Stopped("wrong", f"an answer that is no value: {error}") from None

    def asked(self) -> tuple[list[Any], dict[str, Any]] | None:
        """The call that it makes of the function, or None when it has come to its end without an exception.

        Raises:
            Stopped: it has come to another end.
        """
        message = self._hear()
        if isinstance(message, dict) and message.get("ended") is True:
            return None
        call = message.get("call") if isinstance(message, dict) else None
        if isinstance(call, dict):
            try:
                args, kwargs = call["args"], call["kwargs"]
                return _runner.decode(args), {name: _runner.decode(value) for name, value in kwargs.items()}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise Stopped("wrong", f"a call that is none: {error}") from None
        self._note(message)
        self._raise_complaint()
        raise Stopped("wrong", "it spoke neither of a call nor of its end")

    def answer(self, found: Any) -> None:
        """Give what the function has returned, or the `Stopped` that came instead, as the exception that it was.

        What was none is a TypeError: a value that is no plain data.

        Raises:
            Stopped: it does not take it in time.
        """
        if isinstance(found, Stopped):
            kind, args = found.raised or ("TypeError", [str(found)])
            self._say({"raised": [kind, _runner.encode(args)]})
        else:
            self._say({"value": _runner.encode(found)})

    def output(self) -> bytes:
        """What it prints until its end.

        Raises:
            Stopped: it ended in another way than by itself and without an error.
        """
        said = 0
        while self._report is None:
            try:
                for message in self._messages():
                    self._note(message)
                    said += 1
                if said > 1:
                    raise ValueError("more than one complaint")
            except ValueError:
                self._stop()
                raise Stopped("wrong", "the program spoke in place of its runner") from None
        self._drain()
        self._judge_end()
        return bytes(self._printed)

    @property
    def alive(self) -> bool:
        """Whether it may answer another call."""
        return self._report is None and self._data.fileno() >= 0

    # ------------------------------------------------------------ what it says

    def _answer(self, wanted: str) -> Any:
        message = self._hear()
        if isinstance(message, dict) and wanted in message:
            return message[wanted]
        self._note(message)
        self._raise_complaint()
        raise Stopped("wrong", "the program spoke in place of its function")

    def _hear(self) -> Any:
        """Its next message.

        Raises:
            Stopped: it has ended, or takes too long.
        """
        while True:
            try:
                for message in self._messages():
                    return message
            except ValueError:
                self._stop()
                raise Stopped("wrong", "the program spoke in place of its function") from None
            if self._report is not None:
                self._judge_end()
                raise Stopped("wrong", "it ended before it had answered")

    def _messages(self) -> Iterator[Any]:
        """At most one message; waits for something to happen.

        Raises:
            Stopped: nothing happens until the deadline, or it prints too much.
            ValueError: what it says is no message.
        """
        if (message := unframe(self._received, self._longest)) is not None:
            yield message
            return
        ready = self._wait()
        if self._output in ready:
            self._drain()
        if self._data.fileno() in ready:
            data = b""
            with contextlib.suppress(OSError):
                data = self._data.recv(2**16)
            if data:
                self._received += data
            else:
                self._quiet = True
        if self._control.fileno() in ready and self._data.fileno() not in ready:
            self._read_report()
        if (message := unframe(self._received, self._longest)) is not None:
            yield message

    _quiet = False
    """Whether the program's end of the socket is closed."""
    _shut = False
    """Whether nobody can print any more."""

    def _wait(self) -> set[int]:
        watched = select.poll()
        watched.register(self._control.fileno(), select.POLLIN)
        if not self._quiet:
            watched.register(self._data.fileno(), select.POLLIN)
        if not self._shut:
            watched.register(self._output, select.POLLIN)
        left = self._deadline - monotonic()
        ready = {descriptor for descriptor, _ in watched.poll(max(0.0, left) * 1000)}
        if not ready:
            self._stop()
            raise Stopped("timeout", f"more than {self._deadline - self._began:.3g} s")
        return ready

    def _drain(self) -> None:
        """Read what has been printed.

        Raises:
            Stopped: it is too much.
        """
        while not self._shut:
            try:
                data = os.read(self._output, 2**16)
            except BlockingIOError:
                return
            if not data:
                self._shut = True
            self._printed += data
            if len(self._printed) > MAX_OUTPUT:
                self._stop()
                raise Stopped("resource", f"more than {MAX_OUTPUT} bytes of output")

    def _read_report(self) -> None:
        try:
            data = self._control.recv(2**16)
            report = json.loads(data) if data else {"broken": "the program's supervisor is gone"}
        except (OSError, ValueError) as error:
            report = {"broken": f"the program's supervisor: {error}"}
        self._report = report
        if "broken" in report:
            raise Unavailable(report["broken"])

    def _note(self, message: Any) -> None:
        """Remember why a program says that it failed; it can only speak against itself."""
        if isinstance(message, dict):
            error = message.get("error")
            if isinstance(error, list) and len(error) == 2 and all(isinstance(part, str) for part in error):
                self._complaint = error[0][:100], error[1][:300]
            self._raised = None
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                kind, args = message.get("raised")  # type: ignore[misc]
                if isinstance(kind, str) and isinstance(args, list):
                    self._raised = kind[:100], _runner.decode(args)

    def _raise_complaint(self) -> None:
        if self._complaint is None:
            return
        kind, text = self._complaint
        self._complaint = None
        starved = kind in ("MemoryError", "too large") or "can't start new thread" in text
        starved = starved or (kind == "OSError" and any(f"[Errno {code}]" in text for code in (12, 24, 27, 28)))
        raise Stopped("resource" if starved else "wrong", f"{kind}: {text}" if text else kind, self._raised)

    def _judge_end(self) -> None:
        """Say how the program has ended.

        Raises:
            Stopped: not well.
        """
        assert self._report is not None  # noqa: S101 - called when there is one
        status, cpu = self._report["status"], self._report["cpu"]
        signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = 0 if signalled is not None else os.WEXITSTATUS(status)
        if signalled is None and code > 128:  # as bubblewrap says it
            signalled = code - 128
        if signalled in (signal.SIGKILL, signal.SIGXCPU):
            if cpu >= 0.9 * self._limits.cpu:
                raise Stopped("timeout", f"more than {self._limits.cpu} s of CPU time")
            raise Stopped("resource", "killed, probably for want of memory")
        self._raise_complaint()
        if signalled is not None:
            with contextlib.suppress(ValueError):
                raise Stopped("wrong", f"killed by {signal.Signals(signalled).name}")
            raise Stopped("wrong", f"killed by signal {signalled}")
        if code:
            raise Stopped("wrong", f"exit status {code}")

    def _said(self) -> str:
        return str((self._report or {}).get("said", ""))

    # ------------------------------------------------------------ its end

    def _say(self, message: Any) -> None:
        data = frame(message)
        self._data.settimeout(max(0.001, self._deadline - monotonic()))
        try:
            self._data.sendall(data)
        except TimeoutError:
            self._stop()
            raise Stopped("timeout", f"more than {self._deadline - self._began:.3g} s") from None
        except OSError:  # it has ended, which is heard next
            return
        finally:
            with contextlib.suppress(OSError):
                self._data.settimeout(None)

    def _stop(self) -> None:
        """Kill it, and wait until it is gone."""
        if self._report is not None or self._control.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._control.send(b"kill")
        self._control.settimeout(BREATH)
        try:
            self._report = json.loads(self._control.recv(2**16) or b"{}")
        except (OSError, ValueError):
            self._report = {}

    def close(self) -> None:
        """Kill it if it still runs, and let go of everything."""
        self._stop()
        self._control.close()
        self._data.close()
        if self._output >= 0:
            os.close(self._output)
            self._output = -1

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def _has_size(program: str) -> bool:
    """Whether bubblewrap can bound a tmpfs (from 0.8)."""
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
    return "--size" in done.stdout + done.stderr


# ---------------------------------------------------------------- the self-test

SECRET = "secret that the program must not read"


@dataclass(frozen=True)
class Attack:
    """A program that says, in one word, whether it got out; `held` is what it must come to."""

    name: str
    source: str
    held: tuple[str, ...]
    """Either `contained` (it printed that), or a status of `Stopped`."""


_TRY = """
def attempt():
{body}
try:
    attempt()
except BaseException:
    print("contained")
else:
    print("escaped")
"""


def _attempt(*lines: str) -> str:
    return _TRY.format(body="\n".join(f"    {line}" for line in lines))


_C = "import ctypes; c = ctypes.CDLL(None, use_errno=True)"

ATTACKS = (
    Attack("read a file of the user", _attempt("open({secret!r}).read()"), ("contained",)),
    Attack("read /etc/shadow", _attempt("open('/etc/shadow').read()"), ("contained",)),
    Attack("read the parent's memory", _attempt("open('/proc/{parent}/mem', 'rb').read(1)"), ("contained",)),
    Attack("read the parent's environment", _attempt("open('/proc/{parent}/environ', 'rb').read()"), ("contained",)),
    Attack("write beside the user's files", _attempt("open({secret!r} + '.new', 'w').write('x')"), ("contained",)),
    Attack("delete a file of the user", _attempt("import os; os.unlink({secret!r})"), ("contained",)),
    Attack("cut a file of the user short, or set its times", _attempt("import os", *(
        ["for change in (lambda: os.truncate({secret!r}, 0), lambda: os.utime({secret!r}, (1, 1)),",
         "               lambda: os.open({secret!r}, os.O_RDONLY | os.O_TRUNC)):",
         "    try: change()",
         "    except OSError: continue",
         "    return", "raise OSError"])), ("contained",)),
    Attack("kill the parent", _attempt("import os; os.kill({parent}, 0)"), ("contained",)),
    Attack("signal everybody", _attempt("import os, signal; os.kill(-1, signal.SIGCONT)"), ("contained",)),
    Attack(
        "trace the parent",
        _attempt(_C, "if c.ptrace(16, {parent}, 0, 0): raise OSError"),
        ("contained",),
    ),
    Attack(
        "connect to a local port",
        _attempt("import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)"),
        ("contained",),
    ),
    Attack(
        "connect to an abstract socket",
        _attempt("import socket; socket.socket(socket.AF_UNIX).connect('\\0' + {abstract!r})"),
        ("contained",),
    ),
    Attack(
        "send to a socket with a name",
        _attempt("import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
                 "a.sendto(b'x', {named!r})"),
        ("contained",),
    ),
    Attack(
        "have the kernel signal the parent",
        _attempt("import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, {parent})"),
        ("contained",),
    ),
    Attack("start a program", _attempt("import os; os.execv('/bin/true', ['true'])"), ("contained", "wrong")),
    Attack(
        "fork bomb",
        "import os\ntry:\n    for _ in range(200):\n        if not os.fork():\n            while True: pass\n"
        "    print('escaped')\nexcept OSError:\n    print('contained')\n",
        ("contained",),
    ),
    Attack(
        "thread bomb",
        "import threading, time\nthreading.stack_size(65536)\n"
        "for _ in range(2000):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('escaped')\n",
        ("resource",),
    ),
    Attack("memory bomb", "x = bytearray(2**30)\nprint('escaped')\n", ("resource",)),
    Attack("fill the disk", _attempt("import os", *(
        ["for place in ('/tmp', '.', '/dev/shm', '/var/tmp'):", "    try: f = open(place + '/x', 'wb')",
         "    except OSError: continue", "    for _ in range(64): f.write(bytes(2**20))",
         "    return", "raise OSError"])), ("contained",)),
    Attack("endless output", "import os\nwhile True: os.write(1, b'x' * 65536)\n", ("resource",)),
    Attack(
        "a child of another session",
        "import os, time\ntry:\n    if not os.fork():\n        os.setsid()\n        time.sleep(60)\n"
        "    print('contained')\nexcept OSError:\n    print('contained')\n",
        ("contained",),
    ),
    Attack("ignored signals and sleep", "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal."
           "SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(60)\n", ("timeout",)),
)  # fmt: skip
"""What a tier must hold against; in braces, what the self-test puts up for it to find."""


@dataclass(frozen=True)
class Tested:
    """What became of one attack."""

    name: str
    held: bool
    found: str
    seconds: float


@dataclass(frozen=True)
class Probe:
    """Whether a tier is there: its self-test, and in `missing` why there was none."""

    tier: Tier
    missing: str | None
    attacks: tuple[Tested, ...] = ()
    seconds: float | None = None
    """That a program which prints a word takes, the median of five."""

    @property
    def holds(self) -> bool:
        """Whether programs may run in it."""
        return self.missing is None and bool(self.attacks) and all(attack.held for attack in self.attacks)

    @property
    def reason(self) -> str:
        """Why not; empty where it holds."""
        if self.missing is not None:
            return self.missing
        return "; ".join(f"{attack.name}: {attack.found}" for attack in self.attacks if not attack.held)


REMEDIES: dict[Tier, str] = {
    "bubblewrap": "the package bubblewrap, and user namespaces unless this is root",
    "unshare": "user namespaces: kernel.unprivileged_userns_clone = 1 (Debian), kernel.apparmor_restrict_unprivileged_"
    "userns = 0 (Ubuntu), user.max_user_namespaces > 0; in a container, --cap-add SYS_ADMIN or a seccomp profile that "
    "allows unshare and mount",
    "landlock": "a kernel 5.13 or newer with CONFIG_SECURITY_LANDLOCK and CONFIG_SECCOMP_FILTER, landlock among the "
    "modules of the boot option lsm=, on x86_64 or aarch64",
}
"""What would give a tier."""


def probe(tier: Tier, limits: Limits | None = None) -> Probe:
    """Run the self-test of a tier: a few seconds at most."""
    limits = limits or Limits()
    try:
        with Sandbox(tier, limits) as sandbox:
            seconds = []
            for _ in range(5):
                start = perf_counter()
                said = sandbox.run("print('contained')", b"", 20.0)
                seconds.append(perf_counter() - start)
            if said != b"contained\n":
                return Probe(tier, f"a program that prints a word printed {said[:80]!r}")
            with _targets() as found:
                tested = tuple(_test(sandbox, attack, found) for attack in ATTACKS)
            return Probe(tier, None, tested, sorted(seconds)[2])
    except (Unavailable, Stopped) as error:
        return Probe(tier, str(error) or type(error).__name__)


def _test(sandbox: Sandbox, attack: Attack, targets: Mapping[str, Any]) -> Tested:
    source = attack.source
    for name, value in targets.items():
        source = source.replace("{" + name + "!r}", repr(value)).replace("{" + name + "}", str(value))
    start = perf_counter()
    patience = 0.5 if "timeout" in attack.held else 20.0
    try:
        found = sandbox.run(source, b"", patience).decode(errors="replace").strip()
    except Stopped as stopped:
        found = stopped.status
        if found not in attack.held:
            found += f" ({stopped})"
    return Tested(attack.name, found in attack.held, found[:200] or "nothing", perf_counter() - start)


@contextlib.contextmanager
def _targets() -> Iterator[dict[str, Any]]:
    """Things of this process that the attacks aim at."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        os.chmod(folder, 0o755)  # noqa: S103 - so that permissions alone do not protect it
        secret = os.path.join(folder, "secret")
        with open(secret, "w", encoding="ascii") as file:
            file.write(SECRET)
        os.chmod(secret, 0o666)  # noqa: S103
        server = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        name = f"posttrain-{os.getpid()}-{os.path.basename(folder)}"
        abstract.bind("\0" + name)
        abstract.listen(1)
        named = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        path = os.path.join(folder, "socket")
        with contextlib.suppress(OSError):  # a long path, or a file system without sockets
            named.bind(path)
            os.chmod(path, 0o777)  # noqa: S103
        port = server.getsockname()[1]
        yield {"secret": secret, "parent": os.getpid(), "port": port, "abstract": name, "named": path}


_shared: dict[Tier, Sandbox] = {}


def shared(tier: Tier, *, anew: bool = False) -> Sandbox:
    """The sandbox of this process, or of the one that it was forked from; `anew`: another one, that one has failed.

    Raises:
        Unavailable: it does not start.
    """
    if anew or tier not in _shared:
        if tier in _shared:
            _shared.pop(tier).close()
        _shared[tier] = Sandbox(tier)
    return _shared[tier]


@cache
def probed(tier: Tier) -> Probe:
    """`probe`, once per process."""
    return probe(tier)


def choose(wanted: Literal["auto", "bubblewrap", "unshare", "landlock", "none"]) -> Tier:
    """The tier that programs run in.

    Raises:
        UserError: the one that is wanted does not hold, or none does.
    """
    if wanted == "none":
        return "none"
    failed = []
    for tier in TIERS if wanted == "auto" else (wanted,):
        tested = probed(tier)
        if tested.holds:
            return tier
        failed.append(f"{tier}: {tested.reason} (it takes {REMEDIES[tier]})")
    found = "No sandbox holds" if wanted == "auto" else f"The sandbox {wanted} does not hold"
    raise UserError(
        f"{found} on this machine, so no program of a model is run: {'; '.join(failed)}; provide one (posttrain doctor "
        "sandbox tests it), name an executor elsewhere, or, to run programs without isolation, say sandbox: none."
    )
