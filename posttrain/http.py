"""JSON over HTTP with a deadline for the whole of every call: kept-alive connections, no retries, no proxies."""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import json
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from posttrain.errors import UserError


class Failure(Exception):
    """A call that brought no usable answer; `status` is the HTTP status of one that brought an error."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


class Http:
    """JSON over kept-alive connections. No retries, no proxies, and a deadline for the whole of every call."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no address of a server: write one like http://127.0.0.1:8000.")
        self.host, self._secure = parts.hostname, parts.scheme == "https"
        self._port, self._prefix = parts.port, parts.path.rstrip("/")
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float,
        batch: Batch | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> Any:
        """The decoded answer; None for one that is not JSON.

        Args:
            timeout: seconds for all of it: connecting, sending and reading, however slowly bytes arrive.
            batch: the call of which this is one request.
            headers: beside those that HTTP needs.
            limit: bytes that an answer may have.

        Raises:
            Failure: there is no usable answer, and why.
        """
        deadline = monotonic() + timeout
        data = None if body is None else json.dumps(body).encode()
        headers = {**(headers or {}), **({"Content-Type": "application/json"} if data is not None else {})}
        connection = self._take()
        reused = connection.sock is not None
        try:
            try:
                return self._exchange(connection, method, path, data, headers, deadline, batch, limit)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                connection.close()
                if not reused or (batch is not None and batch.stopped):
                    raise
                # The server had closed it meanwhile, as servers do with idle connections: it never saw the request.
                connection = self._new()
                return self._exchange(connection, method, path, data, headers, deadline, batch, limit)
        except TimeoutError:
            connection.close()
            raise Failure(f"did not answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Failure(f"could not be reached ({error or type(error).__name__})") from None
        except BaseException:
            connection.close()
            raise

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
        batch: Batch | None,
        limit: int | None,
    ) -> Any:
        connection.timeout = left(deadline)
        connection.response_class = partial(_Response, deadline)  # type: ignore[assignment]
        if connection.sock is None:
            connection.connect()
        sock: socket.socket = connection.sock
        with batch.using(sock) if batch is not None else contextlib.nullcontext():
            sock.settimeout(left(deadline))
            connection.request(method, self._prefix + path, body=data, headers=headers)
            response = connection.getresponse()
            pieces, size = [], 0
            while piece := response.read1(2**16):
                pieces.append(piece)
                size += len(piece)
                if limit is not None and size > limit:
                    raise Failure(f"answered {response.status} with more than {limit} bytes", response.status)
            content = b"".join(pieces)
            if response.length:
                raise http.client.IncompleteRead(content, response.length)
            response.close()
        if connection.sock is not None:  # the server keeps it open
            with self._lock:
                self._idle.append(connection)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if response.status != 200:
            said = answer.get("error", answer) if isinstance(answer, dict) else None
            said = said.get("message", said) if isinstance(said, dict) else said
            text = str(said if said is not None else content.decode(errors="replace")).strip()
            raise Failure(f"answered {response.status}: {text[:600] or response.reason}", response.status)
        return answer

    def _take(self) -> http.client.HTTPConnection:
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                    return connection
                connection.close()  # readable while nobody asked: the server has closed it
        return self._new()

    def _new(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self.host, self._port)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()


class DeadlineReader(io.RawIOBase):
    """What a socket sends until `deadline` (monotonic seconds), however slowly: a socket's own timeout starts anew with
    every byte."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.deadline = deadline
        self._sock = sock
        self._source = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Wait for some bytes.

        Raises:
            TimeoutError: the deadline has passed.
        """
        self._sock.settimeout(left(self.deadline))
        return self._source.readinto(buffer)

    def close(self) -> None:
        """Let go of the socket, which is another's to close."""
        self._source.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response that must have come by a deadline."""

    def __init__(self, deadline: float, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self.fp = io.BufferedReader(DeadlineReader(sock, deadline))


class Batch:
    """The requests of one call that are under way: all of them end when one fails."""

    def __init__(self) -> None:
        self.stopped = False
        self._lock = threading.Lock()
        self._active: set[socket.socket] = set()

    @contextlib.contextmanager
    def using(self, sock: socket.socket) -> Iterator[None]:
        """A connection that waits for an answer."""
        with self._lock:
            if self.stopped:
                raise ConnectionAbortedError("given up")
            self._active.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._active.discard(sock)

    def stop(self) -> None:
        """End every request; a server gives up what nobody waits for."""
        with self._lock:
            self.stopped = True
            for sock in self._active:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


def left(deadline: float) -> float:
    """Seconds until a deadline.

    Raises:
        TimeoutError: it has passed.
    """
    remaining = deadline - monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
