"""Executors elsewhere: SandboxFusion (`POST /run_code`) and Piston (`POST /api/v2/execute`), over HTTP.

A program is sent with the input of one test, or, where a function is called, behind a driver that calls it with all
inputs and prints what it returns. Neither sends an expected output.

A server that cannot be reached, answers with an error, nonsense or too late is asked again while there is time, and
then a failure of the infrastructure; only what it says of the program is held against the program.

Source: the documentation of both (bytedance.github.io/SandboxFusion, github.com/engineer-man/piston). Tried against
servers of our own that answer in these formats, and not against theirs.
"""

from __future__ import annotations

import inspect
import json
import secrets
import time
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from posttrain.http import Failure, Http
from posttrain.rewards import _runner
from posttrain.rewards._sandbox import MAX_OUTPUT, Limits, Stopped, Unavailable

PATHS = {"sandbox_fusion": "/run_code", "piston": "/api/v2/execute"}
MAX_RESPONSE = 8 * MAX_OUTPUT
"""Bytes of an answer: outputs are escaped there."""
PAUSE = 0.1
"""Seconds before the second attempt; doubled for each further one."""

_DRIVER = """
def _main():
    request = json.loads(sys.stdin.read())
    results = []
    try:
        function = named(SOURCE, request["function"])
    except BaseException as error:
        results = [{"error": complaint(error)}] * len(request["calls"])
    else:
        for args, kwargs in request["calls"]:
            try:
                value = function(*decode(args), **{name: decode(held) for name, held in kwargs.items()})
                results.append({"value": encode(value)})
            except BaseException as error:
                results.append({"error": complaint(error)})
    sys.stdout.write("\\n" + request["mark"] + json.dumps(results) + "\\n")

_main()
"""


class Remote:
    """One server.

    Raises:
        UserError: the address is none.
    """

    def __init__(self, kind: str, url: str, *, version: str, retries: int) -> None:
        self._http = Http(url)
        self.kind, self._version, self._retries = kind, version, retries

    def run(self, source: str, stdin: str, timeout: float, deadline: float) -> str:
        """What a program prints; it may take `timeout` seconds there, and the answer until `deadline`.

        Raises:
            Stopped: the program did not come to its end as it should.
            Unavailable: there is no answer.
        """
        for attempt in range(self._retries + 1):
            try:
                return self._read(self._ask(self._request(source, stdin, timeout), deadline))
            except Unavailable:
                pause = PAUSE * 2**attempt
                if attempt == self._retries or monotonic() + pause >= deadline:
                    raise
                time.sleep(pause)
        raise AssertionError  # the last attempt returns or raises

    def call(self, source: str, function: str, calls: Sequence[Any], timeout: float, deadline: float) -> list[Any]:
        """What a function returns to each of several calls (arguments and keywords): a value, or `Stopped`.

        Raises:
            Stopped: the program did not come to its end as it should.
            Unavailable: there is no answer.
        """
        mark = secrets.token_hex(16)
        held = [
            [_runner.encode(list(args)), {name: _runner.encode(value) for name, value in kwargs.items()}]
            for args, kwargs in calls
        ]
        request = json.dumps({"function": function, "calls": held, "mark": mark})
        printed = self.run(driver(source), request, timeout, deadline)
        try:
            results = json.loads(printed.rpartition(mark)[2])
        except (ValueError, RecursionError):
            results = None
        if mark not in printed or not isinstance(results, list) or len(results) != len(calls):
            raise Stopped("wrong", "it ended before it had answered")
        return [_value(result) for result in results]

    def _request(self, source: str, stdin: str, timeout: float) -> dict[str, Any]:
        if self.kind == "sandbox_fusion":
            return {"code": source, "language": "python", "stdin": stdin, "compile_timeout": timeout,
                    "run_timeout": timeout}  # fmt: skip
        return {
            "language": "python", "version": self._version, "files": [{"name": "main.py", "content": source}],
            "stdin": stdin, "args": [], "compile_timeout": round(1000 * timeout), "run_timeout": round(1000 * timeout),
            "run_memory_limit": Limits().memory,
        }  # fmt: skip

    def _ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        try:
            answer = self._http.call(
                "POST", PATHS[self.kind], request, timeout=deadline - monotonic(), limit=MAX_RESPONSE
            )
        except Failure as failure:
            raise Unavailable(f"the executor {failure.reason}") from None
        if not isinstance(answer, dict):
            raise Unavailable("the executor answered with something else than a JSON object")
        return answer

    def _read(self, answer: dict[str, Any]) -> str:
        if self.kind == "sandbox_fusion":
            return _read_fusion(answer)
        return _read_piston(answer)


def driver(source: str) -> str:
    """A program that calls a function of the program `source` as stdin says, and prints what it returns."""
    parts: list[Callable[..., Any]] = [_runner.encode, _runner.decode, _runner.named, _runner.complaint]
    head = f"from __future__ import annotations\nimport json, sys\nSOURCE = {source!r}\n"
    return head + "\n".join(inspect.getsource(part) for part in parts) + _DRIVER


def _value(result: Any) -> Any:
    if isinstance(result, dict) and "value" in result:
        try:
            return _runner.decode(result["value"])
        except (ValueError, TypeError, RecursionError) as error:
            return Stopped("wrong", f"an answer that is no value: {error}")
    said = result.get("error") if isinstance(result, dict) else None
    return Stopped("wrong", ": ".join(map(str, said))[:300] if isinstance(said, list) else "no answer")


def _read_fusion(answer: dict[str, Any]) -> str:
    result = answer.get("run_result")
    if answer.get("status") == "SandboxError" or not isinstance(result, dict) or answer.get("status") is None:
        raise Unavailable(f"the executor failed: {str(answer.get('message') or answer)[:200]}")
    if result.get("status") == "TimeLimitExceeded":
        raise Stopped("timeout", "as the executor says")
    if result.get("status") == "Error" or not isinstance(result.get("stdout"), str):
        raise Unavailable(f"the executor failed: {str(result)[:200]}")
    return _ended(result["stdout"], result.get("return_code"), result.get("stderr"))


def _read_piston(answer: dict[str, Any]) -> str:
    result = answer.get("run")
    if not isinstance(result, dict) or not isinstance(result.get("stdout"), str):
        raise Unavailable(f"the executor failed: {str(answer.get('message') or answer)[:200]}")
    status = result.get("status")
    if status == "XX":
        raise Unavailable(f"the executor failed: {str(result.get('message'))[:200]}")
    if status == "TO":
        raise Stopped("timeout", "as the executor says")
    if status in ("OL", "EL"):
        raise Stopped("resource", "too much output, as the executor says")
    if result.get("signal") == "SIGKILL":  # one that says no more kills for time and for memory alike
        raise Stopped("timeout" if status is None else "resource", "killed by the executor")
    return _ended(result["stdout"], result.get("code"), result.get("stderr"))


def _ended(stdout: str, code: Any, stderr: Any) -> str:
    if len(stdout) > MAX_OUTPUT:
        raise Stopped("resource", f"more than {MAX_OUTPUT} characters of output")
    if code != 0:
        said = str(stderr or "").strip().splitlines()[-1:]
        memory = bool(said) and said[0].startswith("MemoryError")
        raise Stopped("resource" if memory else "wrong", (said or [f"exit status {code}"])[0][:300])
    return stdout
