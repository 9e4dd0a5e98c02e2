r"""What runs inside the sandbox: `python -P -s -S _runner.py serve SETTINGS FD`. Standard library only.

It is a program of a model's, or the tests of a row: asserts that run here call a stub, and whoever started them asks
the program, in a sandbox of its own. Neither process knows of the other.

The server reads no program. For each it is sent four descriptors, forks a *supervisor*, and forgets it. The supervisor
forks the process that locks itself in and then runs the program; it reports how that ended, and kills it and all that
it has left when told to, or when whoever asked is gone. A program comes over a socket that only its own process reads,
after the doors are shut, so no program finds another in memory.

The locks, each set by the process that it binds, before it reads the program:

- limits (`setrlimit`) on memory, CPU time, processes, file size, open files; no core files;
- `unshare`: its own user (unless root), mount, process, network, IPC and host name spaces, and a file system of
  read-only libraries and an empty, small /tmp in memory. The first process of a process namespace takes all others
  along when it ends. `bubblewrap` makes the same with the program of that name;
- a user of its own, where this is root (for root the kernel ignores RLIMIT_NPROC), and no capabilities;
- Landlock: opens the standard library and shared libraries for reading, /tmp of the namespace, and nothing else;
  no signals and no abstract sockets to the outside (ABI 6);
- seccomp: a list of system calls that computing needs; none that makes a process, a socket or a namespace, traces,
  or changes the session, and `kill` of itself alone.

Source: man pages landlock(7), seccomp(2), user_namespaces(7), pid_namespaces(7), pivot_root(2); linux/filter.h.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import importlib
import io
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

MAX_MESSAGE = 2**26
"""Bytes of a message to a program."""
MAX_ANSWER = 2**20
"""Bytes of a value that a program returns, as it is sent."""
MAX_CALL = 2**23
"""Bytes of the arguments that tests give to one call, as they are sent."""

_LENGTH = struct.Struct(">I")


# ---------------------------------------------------------------- plain data
# These functions stand alone: other executors get their source.


def encode(value: Any, depth: int = 0) -> Any:
    """A value of Python's plain types as JSON holds it; `decode` gives it back, with its types.

    None, bool, str, int, float, complex, bytes, list, tuple, set, frozenset and dict; a value of a class derived from
    one of them counts as that. What JSON cannot hold is an object with one key that names the type.

    Raises:
        TypeError: it holds another type.
        ValueError: it is nested too deeply.
    """
    if depth > 60:
        raise ValueError("nested too deeply")
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    for base in (str, int, float, complex, bytes, list, tuple, set, frozenset, dict):
        if issubclass(kind, base):
            break
    else:
        raise TypeError(kind.__name__)
    if base is str:
        return str.__str__(value)
    if base is int:
        number = int.__index__(value)
        return number if -(2**63) < number < 2**63 else {"int": hex(number)}
    if base is float:
        real = float.__float__(value)
        return real if real - real == 0 else {"float": float.__repr__(real)}
    if base is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if base is bytes:
        return {"bytes": bytes.hex(value)}
    if base is list:
        return [encode(item, depth + 1) for item in list.__iter__(value)]
    if base is dict:
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in dict.items(value)]}
    items: Any = base.__iter__(value)  # type: ignore[union-attr]
    return {base.__name__: [encode(item, depth + 1) for item in items]}


def decode(form: Any, depth: int = 0) -> Any:
    """The value of which `encode` made this.

    Raises:
        ValueError: nothing was made into this.
        TypeError: what cannot be in a set or be a key is.
    """
    if depth > 60:
        raise ValueError("nested too deeply")
    if isinstance(form, list):
        return [decode(item, depth + 1) for item in form]
    if not isinstance(form, dict):
        return form
    if len(form) != 1:
        raise ValueError("no value")
    ((name, held),) = form.items()
    if name == "int" and isinstance(held, str):
        return int(held, 16)
    if name == "float" and held in ("nan", "inf", "-inf"):
        return float(held)
    if name == "bytes" and isinstance(held, str):
        return bytes.fromhex(held)
    if not isinstance(held, list):
        raise ValueError("no value")
    if name == "dict":
        return {decode(key, depth + 1): decode(item, depth + 1) for key, item in held}
    items = [decode(item, depth + 1) for item in held]
    if name == "complex" and len(items) == 2 and all(type(item) is float for item in items):
        return complex(*items)
    if name in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[name](items)
    raise ValueError("no value")


def named(source: str, function: str) -> Any:
    """Run a program and return the function of that name, or the method of its class `Solution`."""
    space = sys.modules["__main__"].__dict__
    exec(compile(source, "program", "exec", dont_inherit=True), space)  # noqa: S102 - what this is for
    if function not in space and "Solution" in space:
        return getattr(space["Solution"](), function)
    return space[function]


def complaint(error: BaseException) -> list[str]:
    """What an exception of a program is called, and its text."""
    try:
        return [type(error).__name__[:100], str(error)[:300]]
    except BaseException:
        return ["Exception", ""]


def raised(error: BaseException) -> list[Any]:
    """The nearest built-in class of an exception, and its arguments as `encode` makes them, or else its text."""
    kind, args = "Exception", [complaint(error)[1]]
    with contextlib.suppress(BaseException):
        names = (each.__name__ for each in type(error).__mro__ if getattr(builtins, each.__name__, None) is each)
        kind = next(names)
        held = encode(list(error.args))
        args = held if len(json.dumps(held)) <= 10_000 else args
    return [kind, args]


def exception(kind: str, args: list[Any]) -> BaseException:
    """What `raised` was told of, or of a class above it where that takes other arguments.

    One that would end a loop in silence, and with it the asserts in it, is a RuntimeError.
    """
    found = getattr(builtins, kind, None)
    if not isinstance(found, type) or not issubclass(found, BaseException):
        found = Exception
    if issubclass(found, StopIteration | StopAsyncIteration):
        found, args = RuntimeError, [f"the function raised {kind}"]
    for each in found.__mro__:
        with contextlib.suppress(Exception):
            return each(*args)  # type: ignore[no-any-return]
    raise AssertionError  # BaseException takes any


# ---------------------------------------------------------------- system calls

MACHINE = {"x86_64": 0, "aarch64": 1}
"""Machines whose system calls are known; a column of `CALLS`."""
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)

_CALLS = """
read 0 63 write 1 64 readv 19 65 writev 20 66 pread64 17 67 pwrite64 18 68 preadv 295 69 pwritev 296 70 close 3 57
close_range 436 436 fstat 5 80 newfstatat 262 79 stat 4 - lstat 6 - statx 332 291 lseek 8 62 mmap 9 222 munmap 11 215
mprotect 10 226 mremap 25 216 madvise 28 233 msync 26 227 brk 12 214 rt_sigaction 13 134 rt_sigprocmask 14 135
rt_sigreturn 15 139 rt_sigpending 127 136 rt_sigsuspend 130 133 rt_sigtimedwait 128 137 sigaltstack 131 132 access 21 -
faccessat 269 48 faccessat2 439 439 getdents 78 - getdents64 217 61 getcwd 79 17 chdir 80 49 fchdir 81 50 readlink 89 -
readlinkat 267 78 mkdir 83 - mkdirat 258 34 rmdir 84 - unlink 87 - unlinkat 263 35 rename 82 - renameat 264 38
renameat2 316 276 ftruncate 77 46 dup 32 23 dup2 33 - dup3 292 24 pipe 22 - pipe2 293 59 poll 7 - ppoll 271 73
select 23 - pselect6 270 72 epoll_create 213 - epoll_create1 291 20 epoll_ctl 233 21 epoll_wait 232 -
epoll_pwait 281 22 eventfd2 290 19 nanosleep 35 101 clock_nanosleep 230 115 clock_gettime 228 113 clock_getres 229 114
gettimeofday 96 169 time 201 - times 100 153 getpid 39 172 getppid 110 173 gettid 186 178 getuid 102 174
geteuid 107 175 getgid 104 176 getegid 108 177 getgroups 115 158 getpgid 121 155 getpgrp 111 - getsid 124 156
getresuid 118 148 getresgid 120 150 getpriority 140 141 futex 202 98 sched_yield 24 124 sched_getaffinity 204 123
getrandom 318 278 getrusage 98 165 uname 63 160 sysinfo 99 179 exit 60 93 exit_group 231 94 set_robust_list 273 99
rseq 334 293 set_tid_address 218 96 arch_prctl 158 - restart_syscall 219 128 getrlimit 97 163 setrlimit 160 164
setitimer 38 103 getitimer 36 102 alarm 37 - pause 34 - membarrier 324 283 umask 95 166 fsync 74 82 fdatasync 75 83
flock 73 32 sendto 44 206 recvfrom 45 207 sendmsg 46 211 recvmsg 47 212 shutdown 48 210 getsockopt 55 209
setsockopt 54 208 getsockname 51 204 getpeername 52 205 statfs 137 43 fstatfs 138 44 sendfile 40 71
copy_file_range 326 285
"""
_words = _CALLS.split()
CALLS = {
    name: (int(x86), -1 if arm == "-" else int(arm))
    for name, x86, arm in zip(_words[::3], _words[1::3], _words[2::3], strict=True)
}
"""System calls that a program may make with any arguments: their numbers on x86_64 and aarch64 (-1: there is none)."""
_SOME = {
    "clone": (56, 220), "clone3": (435, 435), "ioctl": (16, 29), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "prlimit64": (302, 261), "open": (2, -1), "openat": (257, 56), "fcntl": (72, 25),
    "socketpair": (53, 199),
}  # fmt: skip
"""Those that it may make with some."""
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_FCNTLS = (*range(8), 36, 37, 38, *range(1030, 1035))  # duplicates, flags, locks, the size of pipes, seals
_ACCESS, _TRUNCATE, _KIND_OF_SOCKET = 0o3, 0o1000, 0xF  # O_ACCMODE, O_TRUNC, SOCK_TYPE_MASK
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _MOUNT_SETATTR = 444, 445, 446, 442  # on both machines
_PIVOT_ROOT = (155, 41)
_CAPSET = (126, 91)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_CLONE = {
    "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
    "process": 0x20000000, "network": 0x40000000,
}  # fmt: skip
_CLONE_THREAD = 0x10000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Broken(Exception):
    """The sandbox does not hold, and why; nothing has run in it."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise Broken(f"{what}: {os.strerror(code)} ({errno.errorcode.get(code, code)})")
    return result


def _column() -> int:
    """The column of this machine in tables of system calls.

    Raises:
        Broken: there is none.
    """
    if os.uname().machine not in MACHINE:
        raise Broken(f"the system calls of {os.uname().machine} are not known here")
    return MACHINE[os.uname().machine]


def _syscall(what: str, number: int, *arguments: Any) -> int:
    """A system call by number.

    Raises:
        Broken: it failed.
    """
    words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words), what)


def _prctl(what: str, option: int, argument: Any) -> None:
    words = [ctypes.c_ulong(argument) if isinstance(argument, int) else argument]
    _checked(_libc.prctl(option, *words, *[ctypes.c_ulong(0)] * (5 - 1 - len(words))), what)


# ---------------------------------------------------------------- seccomp


def filter_program(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The filter, as instructions (code, jump if true, jump if false, constant) of classic BPF.

    Refused calls fail with EPERM, and with ENOSYS where the C library then takes an older one; a call of another
    machine (32 bits) kills the process.

    Some are refused for what Landlock does not bind, in any version or before a later one: to set the times of a file,
    or its length by its name, or by opening it for reading; to send a datagram to a socket with a name; to have a
    signal sent to another when a descriptor is ready (F_SETOWN).
    """
    column = MACHINE[machine]
    allow, refuse, absent, no_tty, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x50019, 0x80000000
    load, equal, at_least, masks, both, answer = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    number, arch = 0, 4

    def argument(index: int) -> int:
        return 16 + 8 * index  # its low word: both machines are little-endian

    def one_of(values: Iterator[int] | tuple[int, ...], verdict: int) -> list[tuple[int, int, int, int]]:
        return [step for value in values for step in ((equal, 0, 1, value), (answer, 0, 0, verdict))]

    def opening(flags: int) -> list[tuple[int, int, int, int]]:
        """What is not opened for writing is not truncated; 3 stands for neither reading nor writing."""
        harmful = (_TRUNCATE, _TRUNCATE | _ACCESS, _ACCESS)
        steps = [(load, 0, 0, argument(flags)), (both, 0, 0, _TRUNCATE | _ACCESS), *one_of(harmful, refuse)]
        return [*steps, (answer, 0, 0, allow)]

    program = [(load, 0, 0, arch), (equal, 1, 0, _AUDIT_ARCH[column]), (answer, 0, 0, kill), (load, 0, 0, number)]
    program += one_of((numbers[column] for numbers in CALLS.values() if numbers[column] >= 0), allow)
    guarded: dict[str, list[tuple[int, int, int, int]]] = {
        # A thread, and no new namespace with it.
        "clone": [
            (load, 0, 0, argument(0)),
            (masks, 0, 2, _CLONE_THREAD),
            (masks, 1, 0, sum(_CLONE.values())),
            (answer, 0, 0, allow),
            (answer, 0, 0, refuse),
        ],
        "clone3": [(answer, 0, 0, absent)],
        "ioctl": [(load, 0, 0, argument(1)), *one_of(_IOCTLS, allow), (answer, 0, 0, no_tty)],
        **{
            name: [(load, 0, 0, argument(0)), *one_of((pid,), allow), (answer, 0, 0, refuse)]
            for name in ("kill", "tgkill", "tkill")  # `tkill` names a thread: the first one's number is `pid`
        },
        "prlimit64": [(load, 0, 0, argument(0)), *one_of((0,), allow), (answer, 0, 0, refuse)],
        "open": opening(1),
        "openat": opening(2),
        "fcntl": [(load, 0, 0, argument(1)), *one_of(_FCNTLS, allow), (answer, 0, 0, refuse)],
        # Of the family AF_UNIX, and kinds that speak with their own pair alone.
        "socketpair": [
            (load, 0, 0, argument(0)),
            (equal, 1, 0, socket.AF_UNIX),
            (answer, 0, 0, refuse),
            (load, 0, 0, argument(1)),
            (both, 0, 0, _KIND_OF_SOCKET),
            *one_of((socket.SOCK_STREAM, socket.SOCK_SEQPACKET), allow),
            (answer, 0, 0, refuse),
        ],
    }
    for name, steps in guarded.items():
        if _SOME[name][column] >= 0:
            program += [(equal, 0, len(steps), _SOME[name][column]), *steps]
    program += [(at_least, 0, 1, 447), (answer, 0, 0, absent), (answer, 0, 0, refuse)]
    return program


def _has_seccomp() -> bool:
    return os.uname().machine in MACHINE and bool(_libc.prctl(21, 0, 0, 0, 0) >= 0)  # PR_GET_SECCOMP


def install_filter() -> None:
    """Bind this process by `filter_program`, for good.

    Raises:
        Broken: the kernel or the machine does not know it.
    """
    _column()
    steps = filter_program(os.uname().machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))

    class _Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    program = _Program(len(steps), ctypes.addressof(code))
    _checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(program), 0, 0), "seccomp")


# ---------------------------------------------------------------- Landlock

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15


def landlock_abi() -> int:
    """The version of Landlock that the kernel speaks.

    Raises:
        Broken: none.
    """
    return _syscall("Landlock", _LANDLOCK_CREATE, None, 0, 1)


def _has_landlock() -> bool:
    with contextlib.suppress(Broken):
        return landlock_abi() > 0
    return False


def landlock_rules(seen: Mapping[str, list[str]], newest: int, writable: str | None) -> int:
    """Rules that allow what `places` has found, `DEVICES`, and in `writable` everything: an open descriptor.

    What the kernel's version cannot bind stays as it is, and is for seccomp: truncating (from 3), TCP ports (from 4),
    device commands (from 5), signals and abstract sockets (from 6); in all, sockets with a path, and times of files.

    Raises:
        Broken: the kernel does not know it.
    """
    abi = min(landlock_abi(), newest)
    files = (1 << 13) - 1 | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0) | (1 << 15 if abi >= 5 else 0)
    attributes = struct.pack("=QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _syscall("Landlock's rules", _LANDLOCK_CREATE, attributes[:size], size, 0)
    rules = [(path, _READ_FILE | _READ_DIR) for path in seen["readable"]]
    rules += [(path, _READ_DIR) for path in seen["listed"]]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in DEVICES]
    if writable is not None:
        rules.append((writable, files & ~_EXECUTE))
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        held = files if os.path.isdir(path) else files & _FILE_RIGHTS
        rule = struct.pack("=Qi", rights & held, descriptor)
        _syscall(f"Landlock for {path}", _LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(descriptor)
    return ruleset


def install_landlock(ruleset: int) -> None:
    """Bind this process by `landlock_rules`, for good.

    Raises:
        Broken: the kernel refuses.
    """
    _syscall("Landlock", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


# ---------------------------------------------------------------- the file system

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def places() -> dict[str, list[str]]:
    """What Python reads as it runs, all that a program may see.

    `readable`: the shared libraries, and of the standard library all but what is installed beside it; `listed`: its
    folders, which imports list; `hidden`: what is installed beside it; `visible`: the mounts that hold all this.
    """
    wanted = [
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/share/zoneinfo",
        "/etc/ld.so.cache",
        "/etc/alternatives",
    ]
    with contextlib.suppress(OSError):  # libpython, and what a distribution of Python brings along
        wanted += [entry.path for entry in os.scandir(os.path.join(sys.base_prefix, "lib")) if ".so" in entry.name]
    readable = [path for path in wanted if os.path.exists(path)]
    libraries = [os.path.dirname(os.__file__)]
    libraries += [path for path in sys.path if path.endswith("lib-dynload") and os.path.isdir(path)]
    hidden: list[str] = []
    for folder in libraries:
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            (hidden if name in ("site-packages", "dist-packages") else readable).append(path)
    visible: list[str] = []
    for path in sorted({os.path.normpath(path) for path in [*wanted, *libraries]}, key=len):
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in visible):
            visible.append(path)
    inside = [path for path in readable if any(path.startswith(other + "/") for other in wanted)]
    readable = [path for path in readable if path not in inside]
    return {"readable": readable, "listed": libraries, "hidden": hidden, "visible": visible}


def _mount(what: str, source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    given = None if data is None else data.encode()
    _checked(_libc.mount(*words, ctypes.c_ulong(flags), given), f"{what} ({target})")


def _read_only(target: str) -> None:
    """Make a mount and those below it read-only, without set-user-ID programs and device files."""
    attributes = struct.pack("=QQQQ", 1 | 2 | 4, 0, 0, 0)
    recursive, here = 0x8000, -100
    _syscall(f"read-only {target}", _MOUNT_SETATTR, here, target.encode(), recursive, attributes, len(attributes))


def _new_root(seen: Mapping[str, list[str]], size: int) -> None:
    """Change the root of this process's mount namespace to a file system in memory with what a program may see."""
    nosuid, nodev, noexec, rebind = 2, 4, 8, 0x1000 | 0x4000  # MS_BIND | MS_REC
    private, detach = 0x40000 | 0x4000, 2
    os.umask(0o022)
    _checked(_libc.unshare(_CLONE["mount"]), "unshare of a mount namespace")
    _mount("private mounts", None, "/", None, private)
    _mount("tmpfs", "tmpfs", "/tmp", "tmpfs", nosuid | nodev, "size=1m,nr_inodes=1000,mode=755")  # noqa: S108
    os.mkdir("/tmp/old")  # noqa: S108 - a file system of our own
    _syscall("pivot_root", _PIVOT_ROOT[_column()], b"/tmp", b"/tmp/old")
    os.chdir("/")
    for path in [*seen["visible"], *DEVICES]:
        if os.path.islink("/old" + path):
            os.symlink(os.readlink("/old" + path), path)
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.isdir("/old" + path):
            os.mkdir(path)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        _mount("bind", "/old" + path, path, None, rebind)
        if path not in DEVICES:
            _read_only(path)
    for path in seen["hidden"]:
        if os.path.isdir(path):
            _mount("tmpfs", "tmpfs", path, "tmpfs", nosuid | nodev | 1, "size=4k,mode=755")
    os.mkdir("/tmp")  # noqa: S108
    _mount("tmpfs", "tmpfs", "/tmp", "tmpfs", nosuid | nodev | noexec, f"size={size},nr_inodes=1000,mode=1777")  # noqa: S108
    _checked(_libc.umount2(b"/old", detach), "umount")
    os.rmdir("/old")
    _mount("read-only root", None, "/", None, 0x1000 | 32 | 1 | nosuid | nodev)  # MS_BIND | MS_REMOUNT | MS_RDONLY
    os.chdir("/tmp")  # noqa: S108


def bubblewrap(program: str, data: int, settings: Mapping[str, Any]) -> list[str]:
    """The command that does the same, and then this file's `once`."""
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--setenv", "LANG", "C.UTF-8"]
    command += ["--cap-drop", "ALL"]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    seen = settings["places"]["visible"]
    interpreter = os.path.realpath(sys.executable)
    above = {os.path.dirname(path) for path in [*seen, interpreter, os.path.abspath(__file__)]}
    while more := {os.path.dirname(path) for path in above} - above:
        above |= more
    for path in sorted(above - {"/"}):  # it would make them as closed as they are outside
        if not any((path + "/").startswith(other + "/") for other in seen):
            command += ["--perms", "0755", "--dir", path]
    for path in [*seen, interpreter, os.path.abspath(__file__)]:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif path in seen or not any(path.startswith(other + "/") for other in seen):
            command += ["--ro-bind", path, path]
    for path in settings["places"]["hidden"]:
        if not os.path.abspath(__file__).startswith(path):
            command += ["--tmpfs", path]
    command += ["--perms", "0755", "--dir", "/dev"]
    for path in DEVICES:
        command += ["--dev-bind", path, path]
    if settings["sized"]:
        command += ["--size", str(settings["folder"])]
    command += ["--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp", "--"]  # noqa: S108
    return [*command, interpreter, "-P", "-s", "-S", os.path.abspath(__file__), "once", json.dumps(settings), str(data)]


# ---------------------------------------------------------------- users and limits


def _own_user() -> int | None:
    """A number that nobody else is, for a program that root starts; None where this is not root, or has one number.

    It is one that this user namespace maps, made from the number of this process, the supervisor.
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map", encoding="ascii") as file:
        first, _, count = max((tuple(map(int, line.split())) for line in file), key=lambda entry: entry[2])
    wanted = 1_500_000_000 + os.getpid()
    if first <= wanted < first + count:
        return wanted
    return None if count < 2 else first + count - 1 - os.getpid() % min(30_000, count - 1)


def _tasks_of(user: int) -> int:
    """Threads of a user, on the whole machine."""
    found = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdecimal() and os.stat(f"/proc/{name}").st_uid == user:
                found += len(os.listdir(f"/proc/{name}/task"))
    return found


def _limit(settings: Mapping[str, Any], processes: int) -> None:
    stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    wanted = {
        resource.RLIMIT_AS: settings["memory"],
        resource.RLIMIT_CPU: settings["cpu"],
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_FSIZE: settings["file"],
        resource.RLIMIT_NOFILE: settings["files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in wanted.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    roomy = 2**26 if stack == resource.RLIM_INFINITY else min(2**26, stack)
    resource.setrlimit(resource.RLIMIT_STACK, (roomy, stack))


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    _syscall("capset", _CAPSET[_column()], header, bytes(24))


def _reach_libraries() -> None:
    """Have Python find its libraries by open descriptors, where this user may not walk to them by name.

    Python below a folder that only root may enter is one such place.
    """
    folder = os.path.dirname(os.__file__)
    opened = os.open(folder, os.O_PATH)  # closed by the end of the process
    sys.path[:] = [entry.replace(folder, f"/proc/self/fd/{opened}") for entry in sys.path]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        paths = getattr(module, "__path__", None)
        if isinstance(paths, list):
            paths[:] = [entry.replace(folder, f"/proc/self/fd/{opened}") for entry in paths]


# ---------------------------------------------------------------- one program


def _separate() -> None:
    """Give the supervisor's child its namespaces."""
    kinds = ["process", "network", "ipc", "uts", "cgroup"]
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        kinds.append("user")
    flags = sum(_CLONE[kind] for kind in kinds)
    _checked(_libc.unshare(flags), f"unshare of {', '.join(kinds)} namespaces")
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)


def _lock_in(settings: Mapping[str, Any], inside: bool) -> None:
    """Shut all doors of this process. `inside`: somebody has made its namespaces and file system already.

    Raises:
        Broken, OSError: a door does not shut.
    """
    tier = settings["tier"]
    own_namespace = inside or tier == "unshare"
    user = settings["user"]
    processes = settings["processes"]
    if not own_namespace and user is None:
        # The kernel counts all that the user runs, anywhere. Then this bounds a bomb, and no more.
        processes = _tasks_of(os.geteuid()) + 256
    if tier == "unshare":
        _new_root(settings["places"], settings["folder"])
    elif not inside:
        if user is not None:
            _reach_libraries()
        os.chdir("/")
    ruleset = None
    # Namespaces hold without the other two; without namespaces, both must be there.
    if tier != "none" and settings["landlock"] and (not own_namespace or _has_landlock()):
        # Before the change of user, who may not walk to the libraries by name.
        ruleset = landlock_rules(settings["places"], settings["landlock"], "/tmp" if own_namespace else None)  # noqa: S108
    _limit(settings, processes)
    if user is not None:
        _become(user)
    elif tier != "none" and not (inside and os.geteuid() != 0):  # there, bubblewrap has dropped them
        _drop_capabilities()
    _prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    _prctl("dumpable", _PR_SET_DUMPABLE, 0)
    if not inside:  # after the change of user, which clears it
        _prctl("pdeathsig", _PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if tier == "none":
        return
    if ruleset is not None:
        install_landlock(ruleset)
    if settings["seccomp"] and (not own_namespace or _has_seccomp()):
        install_filter()


def _send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode("ascii")
    channel.sendall(_LENGTH.pack(len(data)) + data)


def _receive(channel: socket.socket) -> Any:
    def exactly(count: int) -> bytes:
        pieces = []
        while count:
            piece = channel.recv(min(count, 2**20))
            if not piece:
                raise EOFError
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    (length,) = _LENGTH.unpack(exactly(_LENGTH.size))
    if length > MAX_MESSAGE:
        raise EOFError
    return json.loads(exactly(length))


def _run_locked(settings: Mapping[str, Any], data: int, inside: bool) -> NoReturn:
    """Lock this process in, and then do what comes over the socket `data`."""
    channel = socket.socket(fileno=data)
    try:
        try:
            for number in range(1, signal.NSIG):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            _lock_in(settings, inside)
        except BaseException as error:
            _send(channel, {"broken": str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"})
            os._exit(1)
        _send(channel, {"ready": True})
        request = _receive(channel)
        os.environ.clear()
        os.environ["LANG"] = "C.UTF-8"
        sys.argv = ["program"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            stream = io.open(descriptor, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115, UP020
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        if request["asks"]:
            _run_tests(channel, request)
        if request["function"] is None:
            _run_script(channel, request["source"])
        _answer_calls(channel, request)
    except EOFError:
        os._exit(0)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            _send(channel, {"error": complaint(error)})
        os._exit(1)


def _run_script(channel: socket.socket, source: str) -> NoReturn:
    """A program from stdin to stdout, to its natural end: threads, exit functions, what is in buffers."""
    import atexit
    import threading

    status = 0
    try:
        try:
            exec(compile(source, "program", "exec", dont_inherit=True), sys.modules["__main__"].__dict__)  # noqa: S102
        except SystemExit as error:
            if error.code is not None and error.code != 0:
                raise
        finally:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
    except BaseException as error:
        status = 1
        with contextlib.suppress(BaseException):
            _send(channel, {"error": complaint(error)})
    os._exit(status)


def _call(function: Callable[..., Any], call: Mapping[str, Any]) -> Any:
    return function(*decode(call["args"]), **{name: decode(held) for name, held in call["kwargs"].items()})


def _answer_calls(channel: socket.socket, request: Mapping[str, Any]) -> NoReturn:
    """Answer one call after another. A later input is not here before the answer to an earlier one is given."""

    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except BaseException as error:
            _send(channel, {"error": complaint(error), "raised": raised(error)})
            return attempt  # no value of any program

    function = attempt(lambda: named(request["source"], request["function"]))
    if function is attempt:
        os._exit(1)
    _send(channel, {"loaded": True})
    while True:
        call = _receive(channel)
        value = attempt(partial(_call, function, call))
        if value is attempt:
            continue
        try:
            message = {"value": encode(value)}
            if len(json.dumps(message)) > MAX_ANSWER:
                message = {"error": ["too large", f"a value of more than {MAX_ANSWER} bytes"]}
        except TypeError as error:
            message = {"error": ["no plain data", str(error)[:100]]}
        except BaseException as error:
            message = {"error": complaint(error)}
        _send(channel, message)


def _run_tests(channel: socket.socket, request: Mapping[str, Any]) -> NoReturn:
    """Tests to their end: each call of the function is asked over the channel, and then how they have ended is said."""
    import random
    import threading

    lock = threading.Lock()
    exits: list[BaseException] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        try:
            call = {"args": encode(list(args)), "kwargs": {name: encode(value) for name, value in kwargs.items()}}
        except TypeError as error:
            raise TypeError(f"an argument that is no plain data: {error}") from None
        if len(json.dumps({"call": call})) > MAX_CALL:
            raise ValueError(f"arguments of more than {MAX_CALL} bytes")
        with lock:
            try:
                _send(channel, {"call": call})
                answer = _receive(channel)
            except BaseException:  # such as an alarm that the tests have set: what comes now answers no later call
                channel.close()
                raise
        if "value" in answer:
            return decode(answer["value"])
        kind, held = answer["raised"]
        its = exception(kind, decode(held))
        if isinstance(its, SystemExit):
            exits.append(its)
        raise its

    stub.__name__ = stub.__qualname__ = request["function"]
    space = sys.modules["__main__"].__dict__
    space[request["function"]] = stub
    random.seed(0)  # the same tests for every program
    said: dict[str, Any] = {"ended": True}
    try:
        exec(compile(request["source"], "tests", "exec", dont_inherit=True), space)  # noqa: S102 - what this is for
    except BaseException as error:
        ends_well = isinstance(error, SystemExit) and error.code in (None, 0)
        if not ends_well or any(error is other for other in exits):
            kind, text = complaint(error)
            where = f"line {_line(error)} of the tests"
            said = {"error": [kind, f"{text[:200]} ({where})" if text else where]}
    with contextlib.suppress(BaseException):
        _send(channel, said)
    os._exit(0)


def _line(error: BaseException) -> int:
    """Where the tests were when it was raised: in the innermost of their own functions."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "tests" else line
        trace = trace.tb_next
    return line or getattr(error, "lineno", None) or 0


# ---------------------------------------------------------------- supervisor and server


def _supervise(settings: Mapping[str, Any], control: socket.socket, data: int, stdin: int, stdout: int) -> NoReturn:
    """Start a program's process, wait for its end, and leave nothing of it."""
    try:
        os.setsid()  # what kills a whole group of workers must leave this process its time to clear up
        _prctl("subreaper", _PR_SET_SUBREAPER, 1)
        settings = {**settings, "user": _own_user()}
        if settings["tier"] == "unshare":
            _separate()
        told = os.memfd_create("told")
        pid = os.fork()
        if not pid:
            try:
                _arrange(stdin, stdout, told, data)
                with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                    file.write("1000")  # the first to go when the machine runs out of memory
                if settings["tier"] == "bubblewrap":
                    program = bubblewrap(settings["program"], 3, settings)
                    os.execv(program[0], program)  # noqa: S606 - no shell
                _silence()
                _run_locked(settings, 3, inside=False)
            finally:
                os._exit(1)
        for descriptor in (data, stdin, stdout):
            os.close(descriptor)
        watched = select.poll()
        watched.register(control.fileno(), select.POLLIN)
        ended = _pidfd(pid)
        if ended is not None:
            watched.register(ended, select.POLLIN)
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            ready = [descriptor for descriptor, _ in watched.poll(None if ended is not None else 5)]
            if control.fileno() in ready:
                break
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        spent = usage.ru_utime + usage.ru_stime
        spent += _clear_up()
        os.lseek(told, 0, os.SEEK_SET)
        said = os.read(told, 1000).decode(errors="replace").strip()
        report = {"status": status, "cpu": spent, "said": said}
    except BaseException as error:
        report = {"broken": str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError):
        control.send(json.dumps(report).encode())
    os._exit(0)


def _arrange(stdin: int, stdout: int, stderr: int, data: int) -> None:
    """Descriptors 0 to 3, and no other."""
    moved = [os.dup(descriptor) for descriptor in (stdin, stdout, stderr, data)]
    high = [_lifted(descriptor) for descriptor in moved]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place, inheritable=True)
    os.closerange(4, 4096)


def _silence() -> None:
    """Nobody hears what a program says on stderr."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _lifted(descriptor: int) -> int:
    """The same file under a number of 10 or more."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)


def _pidfd(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


def _clear_up() -> float:
    """Kill what a program has left: with the subreaper's mark, all of it has become children of this process."""
    spent = 0.0
    while True:
        try:
            with open("/proc/self/task/" + str(os.getpid()) + "/children", encoding="ascii") as file:
                for child in file.read().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
        except OSError:
            pass
        try:
            _, _, usage = os.wait4(-1, 0)
            spent += usage.ru_utime + usage.ru_stime
        except ChildProcessError:
            return spent


PRELOADED = """
bisect collections copy dataclasses datetime decimal fractions functools heapq itertools math operator random re
statistics string threading typing
"""
"""What programs import most, so that not each of them has to."""


def serve(settings: Mapping[str, Any], control: socket.socket) -> None:
    """Fork a supervisor for every four descriptors that come, until nobody can send any."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.environ.clear()
    settings = {**settings, "places": places()}
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 4)
        if not message:
            return
        if len(descriptors) == 4 and not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            own, data, stdin, stdout = descriptors
            _supervise(settings, socket.socket(fileno=own), data, stdin, stdout)
        for descriptor in descriptors:
            os.close(descriptor)


def main() -> None:
    """`serve SETTINGS FD`, or within bubblewrap `once SETTINGS FD`."""
    _, verb, settings, descriptor = sys.argv
    if verb == "serve":
        serve(json.loads(settings), socket.socket(fileno=int(descriptor)))
        return
    _silence()
    _run_locked(json.loads(settings), int(descriptor), inside=True)


if __name__ == "__main__":
    main()
