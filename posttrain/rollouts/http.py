"""JSON over HTTP with a deadline for the whole of every call: kept-alive connections, no retries, no proxies."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import threading
from collections.abc import Iterator
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

    def call(self, method: str, path: str, body: Any = None, *, timeout: float, batch: Batch | None = None) -> Any:
        """The decoded answer; None for one that is not JSON."""
        deadline = monotonic() + timeout
        data = None if body is None else json.dumps(body).encode()
        connection = self._take()
        reused = connection.sock is not None
        try:
            try:
                return self._exchange(connection, method, path, data, deadline, batch)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                connection.close()
                if not reused or (batch is not None and batch.stopped):
                    raise
                # The server had closed it meanwhile, as servers do with idle connections: it never saw the request.
                connection = self._new()
                return self._exchange(connection, method, path, data, deadline, batch)
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
        deadline: float,
        batch: Batch | None,
    ) -> Any:
        connection.timeout = _left(deadline)
        if connection.sock is None:
            connection.connect()
        sock: socket.socket = connection.sock
        with batch.using(sock) if batch is not None else contextlib.nullcontext():
            sock.settimeout(_left(deadline))
            headers = {"Content-Type": "application/json"} if data is not None else {}
            connection.request(method, self._prefix + path, body=data, headers=headers)
            sock.settimeout(_left(deadline))
            response = connection.getresponse()
            pieces = []
            while piece := response.read1(2**16):
                pieces.append(piece)
                sock.settimeout(_left(deadline))
            content = b"".join(pieces)
            if response.length:
                raise http.client.IncompleteRead(content, response.length)
            response.close()
        if connection.sock is not None:  # the server keeps it open
            with self._lock:
                self._idle.append(connection)
        try:
            answer = json.loads(content)
        except ValueError:
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


def _left(deadline: float) -> float:
    remaining = deadline - monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining
