"""A proxy on loopback before an S3-compatible server: it answers some requests with an error, or cuts them off."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = int | Literal["reset"]
_CODES = {403: "AccessDenied", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}


class FaultyProxy:
    """A context manager. `url`: where it listens; `seen`: method and path of each request; `left`: faults to come;
    `sent`: path and bytes of each content that the server sent."""

    def __init__(self, server: str) -> None:
        self.seen: list[tuple[str, str]] = []
        self.sent: list[tuple[str, int]] = []
        self.left = 0
        self._suffix, self._fault = "", 0
        self._lock = threading.Lock()
        self._server = urlsplit(server).netloc
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def fail(self, suffix: str, fault: Fault, times: int) -> None:
        """Answer the next requests for a path that ends so with a status, or reset their connection."""
        with self._lock:
            self._suffix, self._fault, self.left = suffix, fault, times

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.seen.append((method, path))
            if self.left and path.endswith(self._suffix):
                self.left -= 1
                return self._fault
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                path = urlsplit(self.path).path
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._next_fault(self.command, path)
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                elif fault is not None:
                    code = _CODES[int(fault)]
                    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
                    self.reply(int(fault), [("Content-Type", "application/xml")], text.encode())
                else:
                    server = http.client.HTTPConnection(proxy._server)
                    server.request(self.command, self.path, body, dict(self.headers.items()))
                    found = server.getresponse()
                    content = found.read()
                    with proxy._lock:
                        proxy.sent.append((path, len(content)))
                    self.reply(found.status, found.getheaders(), content)
                    server.close()

            def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                dropped = {"content-length", "transfer-encoding", "connection"}
                length = next((value for name, value in headers if name.lower() == "content-length"), "")
                for name, value in headers:
                    if name.lower() not in dropped:
                        self.send_header(name, value)
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                """Nothing."""

        return Handler
