"""Serving verifiers over HTTP, for the reward `remote` and for others that train.

    GET  /health               {"status": "ok", "rewards": {name: {"columns": [...], "accuracy": bool}}}
    POST /score[/NAME]         {"completions": [text, ...], "rows": [{column: value, ...}, ...]}
                               → {"verdicts": [{"reward", "status", "answer", "detail", "seconds"}, ...]}
    POST /get_reward[/NAME]    {"query": [text, ...], "prompts": [text, ...], "labels": [label, ...]}
                               → {"rewards": [number, ...], "scores": [number, ...]}

NAME may be left out where one reward is served. An error is {"error": sentence}, with 400 for what cannot be judged,
401 without the token, 404, 411, 413 and 415 as HTTP has them, 503 for more at a time than may be, 504 after the
deadline.

/get_reward speaks as OpenRLHF's remote_rm_url does: `query` is a prompt and its completion, of which what `prompts`
says is cut off; a label is the reward's column, or where it needs several, an object of them or one as JSON. `strip` is
cut off the end of every query: what OpenRLHF's tokenizer leaves there, such as `<|im_end|>`. OpenRLHF has no way to be
told that there is no reward, so a request with such a verdict is a 500 that names the first.

Requests come from a machine that is trusted with the verifiers, not from browsers: a body must be application/json, and
where the server listens on loopback it must be asked by a name of loopback. Verifiers that are `isolated` judge in
worker processes as everywhere; a request that is over the deadline keeps its place until its workers have ended.
"""

from __future__ import annotations

import contextlib
import hmac
import http.server
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from posttrain.errors import UserError, did_you_mean
from posttrain.http import DeadlineReader, is_loopback
from posttrain.rewards import Verdict, Verifier, load

MAX_COMPLETIONS = 4096
"""In a request."""
MAX_CONNECTIONS = 256
IDLE = 60.0
"""Seconds that a connection may be silent between requests, and that a request's head may take."""
MAX_TEXT = 10_000
"""Characters of a verdict's answer and detail that are sent."""
PATIENCE = 5.0
"""Seconds that requests under way have when the server is stopped."""


class Refusal(Exception):
    """A request that is not served: HTTP status and reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def servable(name: str, options: Mapping[str, Any]) -> Verifier:
    """The verifier `name`, if it can judge for others.

    Raises:
        UserError: it cannot be built or served, and why.
    """
    if name == "remote":
        raise UserError("The reward 'remote' is judged elsewhere already: name its server in the recipe.")
    verifier = load(name, options)
    if verifier.group_size > 1:
        raise UserError(
            f"The reward '{name}' compares the answers to a prompt with one another, which a request may hold only a "
            "part of: name it in the recipe instead of serving it."
        )
    if name == "sql" and verifier.options.db_root is None:
        raise UserError(
            "The reward 'sql' would open every database of this machine that a request names: set the option db_root "
            "to the folder of those that it may open."
        )
    return verifier


class RewardServer:
    """A server of verifiers; it listens from the beginning and answers while `serve` runs. A context manager.

    Args:
        verifiers: what is served, by name.
        host: where it listens.
        port: 0 takes a free one.
        token: what a request must carry as a bearer token; None lets everybody ask who reaches the port.
        deadline: seconds for a request: to read it, and again to judge it.
        max_bytes: of a request.
        max_requests: judged at a time; further ones are told to come again.
        strip: cut off the end of OpenRLHF's queries.

    Raises:
        UserError: it cannot listen there.
    """

    def __init__(
        self,
        verifiers: Mapping[str, Verifier],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        deadline: float = 60.0,
        max_bytes: int = 64 * 2**20,
        max_requests: int = 32,
        strip: str = "",
    ) -> None:
        self.verifiers, self.host, self.deadline = dict(verifiers), host, deadline
        self._token, self.max_bytes, self.strip = token, max_bytes, strip
        self._places = threading.BoundedSemaphore(max_requests)
        self._max_requests = max_requests
        self._changed = threading.Condition()
        self._under_way = 0
        self._closing = False
        try:
            self._server = _Server((host, port), self)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"A server cannot listen on port {port} of {host} ({error}): choose another port or host."
            ) from None

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where it answers, seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def serve(self) -> None:
        """Answer until `stop` is called by another thread, or an exception such as a Ctrl-C comes."""
        self._server.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """End `serve`."""
        self._server.shutdown()

    def close(self) -> None:
        """Listen no more; what is being judged has a few seconds to be answered."""
        self._server.server_close()
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._under_way, PATIENCE)
        self._server.hang_up()

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """A request, until it has been answered.

        Raises:
            Refusal: the server is being stopped.
        """
        with self._changed:
            if self._closing:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the server is being stopped")
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def allowed(self, authorization: str) -> bool:
        """Whether a request's header of that name carries the token."""
        if self._token is None:
            return True
        return hmac.compare_digest(authorization.encode("utf-8", "replace"), f"Bearer {self._token}".encode())

    def health(self, *, allowed: bool) -> dict[str, Any]:
        """What /health says."""
        if not allowed:
            return {"status": "ok"}
        served = {
            name: {"columns": [*verifier.requires, *verifier.sampled], "accuracy": verifier.accuracy}
            for name, verifier in self.verifiers.items()
        }
        return {"status": "ok", "rewards": served}

    def answer(self, path: str, request: Any) -> dict[str, Any]:
        """The answer to a POST.

        Raises:
            Refusal: there is none, and why.
        """
        kind, _, name = path.strip("/").partition("/")
        if kind not in ("score", "get_reward"):
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no {path[:100]}: POST to /score or /get_reward")
        verifier = self._verifier(kind, name)
        if not isinstance(request, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the body is a {type(request).__name__}, not an object")
        if kind == "get_reward":
            completions, rows = self._of_openrlhf(verifier, request)
        else:
            completions, rows = _texts(request, "completions"), _list(request, "rows", len(request["completions"]))
            _require_keys(request, ("completions", "rows"))
        needed = (*verifier.requires, *verifier.sampled)
        for number, row in enumerate(rows):
            missing = [column for column in needed if not isinstance(row, dict) or column not in row]
            if missing:
                raise Refusal(
                    HTTPStatus.BAD_REQUEST,
                    f"row {number} lacks the column '{missing[0]}', which the reward '{verifier.name}' needs",
                )
        verdicts = self._judge(verifier, completions, rows)
        if kind == "score":
            return {"verdicts": [_sent(verdict) for verdict in verdicts]}
        bad = next((index for index, verdict in enumerate(verdicts) if verdict.reward is None), None)
        if bad is not None:
            raise Refusal(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                f"there is no reward for query {bad} ({verdicts[bad].status}: {verdicts[bad].detail[:300]})",
            )
        rewards = [verdict.reward for verdict in verdicts]
        return {"rewards": rewards, "scores": rewards}

    def _verifier(self, kind: str, name: str) -> Verifier:
        if not name and len(self.verifiers) == 1:
            return next(iter(self.verifiers.values()))
        if name not in self.verifiers:
            reason = (
                f"there is no reward '{name[:80]}' here{did_you_mean(name[:80], self.verifiers)}"
                if name
                else f"several rewards are served: POST to /{kind}/NAME, with one of {', '.join(self.verifiers)}"
            )
            raise Refusal(HTTPStatus.NOT_FOUND, reason)
        return self.verifiers[name]

    def _of_openrlhf(self, verifier: Verifier, request: dict[str, Any]) -> tuple[list[str], list[Any]]:
        queries = _texts(request, "query")
        prompts = _list(request, "prompts", len(queries)) if "prompts" in request else [""] * len(queries)
        labels = _list(request, "labels", len(queries)) if "labels" in request else [""] * len(queries)
        _require_keys(request, ("query", "prompts", "labels"))
        completions = []
        for number, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            if not isinstance(prompt, str) or not query.startswith(prompt):
                raise Refusal(HTTPStatus.BAD_REQUEST, f"query {number} does not begin with its prompt")
            completions.append(query[len(prompt) :].removesuffix(self.strip))
        columns = [column for column in verifier.requires if column != "prompt"]
        rows = []
        for number, (label, prompt) in enumerate(zip(labels, prompts, strict=True)):
            row = {columns[0]: label} if len(columns) == 1 and not isinstance(label, dict) else label
            if len(columns) != 1 and isinstance(label, str):
                try:
                    row = json.loads(label) if label or columns else {}
                except (ValueError, RecursionError):
                    row = None
            if not isinstance(row, dict):
                raise Refusal(
                    HTTPStatus.BAD_REQUEST, f"label {number} is no object with {', '.join(columns)}, nor one as JSON"
                )
            rows.append({**row, "prompt": prompt})
        return completions, rows

    def _judge(
        self, verifier: Verifier, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[Verdict]:
        """The verdicts, by the deadline.

        Raises:
            Refusal: too many requests are judged already, or these take too long.
        """
        if not self._places.acquire(blocking=False):
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{self._max_requests} requests are being judged already: come again"
            )
        found: list[list[Verdict] | Exception] = []

        def judge() -> None:
            try:
                found.append(verifier.score(completions, rows))
            except Exception as error:
                found.append(error)
            finally:
                self._places.release()

        thread = threading.Thread(target=judge, name="posttrain-judge", daemon=True)
        thread.start()
        thread.join(self.deadline)
        if not found:
            raise Refusal(HTTPStatus.GATEWAY_TIMEOUT, f"judging took more than {self.deadline:g} s")
        verdicts = found[0]
        if isinstance(verdicts, Exception):
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(verdicts).__name__}: {verdicts}")
        return verdicts


class _Server(http.server.ThreadingHTTPServer):
    """Connections, so many at a time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], owner: RewardServer) -> None:
        self.owner = owner
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without looking up the machine's name, which may take seconds."""
        super(http.server.HTTPServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, or the word that there are too many."""
        with self._guard:
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                self._open.add(request)
        if not full:
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End every connection."""
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone, or was too slow, is nothing to speak of."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection, and the requests on it."""

    protocol_version = "HTTP/1.1"
    server_version = "posttrain"
    sys_version = ""
    server: _Server

    def setup(self) -> None:
        """Read with deadlines."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = DeadlineReader(self.connection, 0.0)
        self.rfile.close()
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        """Wait for a request and answer it."""
        self._reader.deadline = monotonic() + IDLE
        super().handle_one_request()

    def do_GET(self) -> None:
        """/health."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """/score and /get_reward."""
        self._answer(self._post)

    def _get(self) -> dict[str, Any]:
        if urlsplit(self.path).path != "/health":
            raise Refusal(HTTPStatus.NOT_FOUND, "there is /health to GET, and /score and /get_reward to POST to")
        return self.server.owner.health(allowed=self.server.owner.allowed(self.headers.get("Authorization", "")))

    def _post(self) -> dict[str, Any]:
        owner = self.server.owner
        if not owner.allowed(self.headers.get("Authorization", "")):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "the request does not carry the token: send it as Authorization")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json")
        length = self._only("Content-Length")
        if "Transfer-Encoding" in self.headers or not length.isascii() or not length.isdecimal() or len(length) > 15:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
        if int(length) > owner.max_bytes:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request has {length} bytes and may have {owner.max_bytes}: send fewer completions at a time",
            )
        self._reader.deadline = monotonic() + owner.deadline
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise ConnectionResetError
        try:
            request = json.loads(content)
        except (ValueError, RecursionError):
            raise Refusal(HTTPStatus.BAD_REQUEST, "the body is no JSON") from None
        self._whole = True
        return owner.answer(urlsplit(self.path).path, request)

    def _answer(self, answer: Callable[[], dict[str, Any]]) -> None:
        """Send what `answer` returns, or why there is nothing. After an error that left the body unread, hang up."""
        try:
            with self.server.owner.under_way():
                self._answer_now(answer)
        except Refusal as refusal:
            self._send(refusal.status, {"error": refusal.reason}, keep=False)

    def _answer_now(self, answer: Callable[[], dict[str, Any]]) -> None:
        self._whole = self.command == "GET"
        try:
            if is_loopback(self.server.owner.host) and not self._asked_by_loopback():
                raise Refusal(HTTPStatus.FORBIDDEN, "this server is asked by a name of loopback, such as localhost")
            content = answer()
        except Refusal as refusal:
            self._send(refusal.status, {"error": refusal.reason}, keep=self._whole)
        else:
            self._send(HTTPStatus.OK, content, keep=True)

    def _send(self, status: HTTPStatus, content: dict[str, Any], *, keep: bool) -> None:
        data = json.dumps(content).encode("ascii")
        self.close_connection = self.close_connection or not keep
        self.connection.settimeout(self.server.owner.deadline)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is no request, or none that is served, in JSON as all errors are."""
        self.close_connection = True
        self.request_version = self.protocol_version  # of nonsense there is none, and then no status is sent
        status = HTTPStatus(code)
        self._send(status, {"error": message or status.phrase}, keep=False)

    def _only(self, header: str) -> str:
        """The value of a header; empty where it is missing, or there twice."""
        found = self.headers.get_all(header, [])
        return str(found[0]) if len(found) == 1 else ""

    def _asked_by_loopback(self) -> bool:
        try:
            host = urlsplit(f"//{self._only('Host')}").hostname
        except ValueError:
            return False
        return host is not None and is_loopback(host)

    def log_message(self, *_: Any) -> None:
        """Nothing: a request is no news."""


def _texts(request: dict[str, Any], key: str) -> list[str]:
    found = request.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise Refusal(HTTPStatus.BAD_REQUEST, f"'{key}' must be a list of texts")
    if len(found) > MAX_COMPLETIONS:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"'{key}' has {len(found)} texts and may have {MAX_COMPLETIONS}: send fewer at a time",
        )
    return found


def _list(request: dict[str, Any], key: str, count: int) -> list[Any]:
    found = request.get(key)
    if not isinstance(found, list) or len(found) != count:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"'{key}' must be a list of {count}, one for each completion")
    return found


def _require_keys(request: dict[str, Any], known: Sequence[str]) -> None:
    for key in request:
        if key not in known:
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"there is no '{key[:80]}' in a request{did_you_mean(key[:80], known)}"
            )


def _sent(verdict: Verdict) -> dict[str, Any]:
    return {
        "reward": verdict.reward,
        "status": verdict.status,
        "answer": None if verdict.answer is None else verdict.answer[:MAX_TEXT],
        "detail": verdict.detail[:MAX_TEXT],
        "seconds": verdict.seconds,
    }
