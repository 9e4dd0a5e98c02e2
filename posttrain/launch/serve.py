"""Starting a vLLM server for a model, with everything that training, syncing and scoring need, and ending all of it."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.launch.workers import launched
from posttrain.recipe import Lora, Vllm
from posttrain.rollouts.engine import EngineError
from posttrain.rollouts.vllm_common import check_model, prepare_environment, rank_limit, require_vllm
from posttrain.rollouts.vllm_worker import EXTENSION

_STOP_SECONDS = 20.0
"""Between the request to end and the end by force, in seconds."""

_EVERY_SECONDS = 10.0
"""Between two lines of progress."""

# Becomes the server, after asking for a SIGTERM when the process that started it dies, also by SIGKILL.
_GUARD = """
import os, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class ServerProcess:
    """A vLLM server of one model, as a process group of its own; a context manager.

    It hears no Ctrl-C of the terminal (the trainer saves its checkpoint first and stops it then), and ends when the
    thread that launched it does: launch it from the main thread.

    Args:
        model: a folder, or a name on the hub.
        host: where it listens. Whoever reaches the port can replace the weights.
        port: a free one by default.
        dtype: in which it computes.
        vllm: memory, lengths and parallelism.
        devices: its CUDA_VISIBLE_DEVICES; those of this process by default.
        lora: the adapters that it must take beside its weights; none by default.
        revision: of a model on the hub.
        log: where its output goes; a temporary file by default, deleted after a clean end.
        timeout: seconds until it must answer.

    Raises:
        UserError: the model cannot be read or cannot run on this machine, or the port is taken.
    """

    def __init__(
        self,
        model: str,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        dtype: str = "float32",
        vllm: Vllm | None = None,
        devices: str | None = None,
        lora: Lora | None = None,
        revision: str | None = None,
        log: Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.model, self.host, self.timeout = model, host, timeout
        self._on_cpu = not torch.cuda.is_available()
        _check(model, revision, on_cpu=self._on_cpu)
        self.port = _port(host, port)
        self._arguments = _arguments(model, host, self.port, dtype, vllm or Vllm(), lora, revision, on_cpu=self._on_cpu)
        self._devices, self._lora = devices, lora is not None
        self._own_log = log is None
        self.log = log or Path(tempfile.gettempdir()) / f"posttrain-serve-{os.getpid()}-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._failed = False

    @property
    def url(self) -> str:
        """Where it answers, seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id, which is its process group's too; None unless started."""
        return None if self._process is None else self._process.pid

    @classmethod
    def start(cls, model: str, **settings: Any) -> ServerProcess:
        """Launch a server, with the arguments of the class, and wait until it answers.

        Raises:
            UserError: as the class; and as `wait`.
        """
        server = cls(model, **settings)
        server.launch()
        server.wait()
        return server

    def launch(self) -> None:
        """Start the process and return at once."""
        prepare_environment(on_cpu=self._on_cpu)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - no shell, and the arguments are ours
                [sys.executable, "-c", _GUARD, str(os.getpid()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(os.environ, devices=self._devices, lora=self._lora),
            )
        atexit.register(self.stop)

    def wait(self, *, shown: bool = True) -> float:
        """Block until it answers, with a line of progress every ten seconds; the seconds that it took.

        Raises:
            EngineError: it died, or did not answer in time. It is stopped then.
        """
        started = printed = monotonic()
        try:
            while not self._answers():
                waited = monotonic() - started
                dead = self.death()
                if dead is not None:
                    raise EngineError(dead)
                if waited > self.timeout:
                    self._failed = True
                    raise EngineError(
                        f"The vLLM server of {self.model} at {self.url} did not answer GET /health within "
                        f"{self.timeout:g} s: read its log ({self.log}), or raise the start timeout."
                    )
                if shown and monotonic() - printed > _EVERY_SECONDS:
                    printed = monotonic()
                    print(f"starting the vLLM server of {self.model}  {waited:.0f} s", file=sys.stderr, flush=True)
                sleep(0.2)
        except BaseException:
            self.stop()
            raise
        return monotonic() - started

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5.0) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def death(self) -> str | None:
        """Why the server ended, in a sentence; None while it runs."""
        if self._process is None or self._process.poll() is None:
            return None
        self._failed = True
        said = last_words(self.log.read_text(encoding="utf-8", errors="replace")) if self.log.is_file() else ""
        return (
            f"the vLLM server of {self.model} at {self.url} ended with exit code {self._process.returncode}"
            f"{f' ({said})' if said else ''}; its log is {self.log}"
        )

    def stop(self) -> None:
        """End the whole process group; its port, its shared memory and its own log go with it. Can be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        group = process.pid
        shared = _shared_memory(group)
        if process.poll() is None:
            process.terminate()  # the first process only, which ends the others in good order
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        deadline = monotonic() + 2.0
        while members(group) and monotonic() < deadline:
            process.poll()
            sleep(0.05)
        # Python's resource trackers delete what the others have left, as soon as those are gone.
        deadline = monotonic() + _STOP_SECONDS
        while remaining := members(group):
            others = [pid for pid in remaining if b"multiprocessing.resource_tracker" not in _command(pid)]
            for pid in others if monotonic() < deadline else remaining:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
            sleep(0.05)
        process.wait()
        for path in shared:  # left over where the end was not a good one
            Path(path).unlink(missing_ok=True)
        if self._own_log and not self._failed:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> ServerProcess:
        self.launch()
        self.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def environment(surrounding: Mapping[str, str], *, devices: str | None, lora: bool) -> dict[str, str]:
    """The environment of a server: the surrounding one without what a launcher has put there."""
    found = {name: value for name, value in surrounding.items() if not launched(name)}
    found |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    if devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = devices
    if lora:
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return found


def _arguments(
    model: str,
    host: str,
    port: int,
    dtype: str,
    settings: Vllm,
    lora: Lora | None,
    revision: str | None,
    *,
    on_cpu: bool,
) -> list[str]:
    # The module, because the command `vllm` belongs to one of the two distributions only.
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host, "--port", str(port)]
    arguments += ["--dtype", dtype, "--max-num-seqs", str(settings.max_num_seqs)]
    arguments += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--generation-config", "vllm"]
    arguments += ["--worker-extension-cls", EXTENSION, "--tensor-parallel-size", str(settings.tensor_parallel)]
    arguments += ["--disable-uvicorn-access-log"]
    arguments += ["--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"]
    if settings.max_model_len is not None:
        arguments += ["--max-model-len", str(settings.max_model_len)]
    if revision is not None:
        arguments += ["--revision", revision]
    if on_cpu if settings.enforce_eager is None else settings.enforce_eager:
        arguments += ["--enforce-eager"]
    if not on_cpu:
        share = 0.9 if settings.gpu_memory_utilization is None else settings.gpu_memory_utilization
        arguments += ["--gpu-memory-utilization", str(share), "--weight-transfer-config", '{"backend": "nccl"}']
    if lora is not None:
        arguments += ["--enable-lora", "--max-lora-rank", str(rank_limit(lora.r))]
    return arguments


def _check(model: str, revision: str | None, *, on_cpu: bool) -> None:
    require_vllm(on_cpu=on_cpu)
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UserError(f"{model} holds no config.json: name the folder of a saved model.")
    if not Path(model).is_dir() and looks_like_a_path:
        raise UserError(f"There is no folder {model}: name the folder of a saved model, or a model on the hub.")
    try:
        check_model(model, on_cpu=on_cpu, revision=revision)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"The model {model} cannot be read as a folder or from the hub: {reason}") from None


def _port(host: str, port: int | None) -> int:
    """The port, or a free one.

    Raises:
        UserError: it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port or 0))
            probe.listen(1)
        except (OSError, OverflowError) as error:
            where = f"port {port} of {host}" if port else host
            raise UserError(f"A server cannot listen on {where} ({error}): choose another port or host.") from None
        return int(probe.getsockname()[1])


def last_words(log: str) -> str:
    """The error in a server's log that explains its end: the first one, without what merely reports it."""
    prefix = r"^(\([^)]*\)\s*)?([A-Z]+ \d\d-\d\d [\d:]+ )?(\[[^\]]*\]\s*)?"  # (process) LEVEL date time [file:line]
    plain = [line for line in (re.sub(prefix, "", line).strip() for line in log.splitlines()) if line]
    for index, line in enumerate(plain):
        if re.match(r"([\w.]+\.)?\w*(Error|Exception|error):? ", line) and "root cause" not in line:
            details = plain[index + 1 : index + 3] if "validation error" in line else []  # pydantic says more below
            return " ".join([line, *details])[:600]
    return " ".join(plain[-3:])[:600]


def members(group: int) -> list[int]:
    """Ids of the processes of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if int(process_group) == group and state not in ("Z", "X"):
            found.append(int(stat.parent.name))
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def _shared_memory(group: int) -> set[str]:
    """Files in /dev/shm that the processes of a group have mapped: a killed server leaves its own there."""
    found = set()
    for pid in members(group):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        found |= {match for match in re.findall(r"(/dev/shm/(?:psm_|vllm_)\S+)$", maps, re.MULTILINE)}
    return found
