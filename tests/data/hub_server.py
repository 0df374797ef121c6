"""A hub on loopback that answers as Hugging Face's does, as far as its file system asks; it counts what is fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote


@contextmanager
def hub_server(name: str, revisions: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Within it the hub has the dataset `name` with files by revision; gives its URL, and (request, bytes sent)."""
    asked: list[tuple[str, int]] = []
    api = f"/api/datasets/{name}"

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def answer(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            sent = b"" if self.command == "HEAD" else data
            self.wfile.write(sent)
            asked.append((f"{self.command} {self.path}", len(sent)))

        def absent(self, code: str) -> None:
            self.answer(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": "not there"})

        def as_json(self, value: Any) -> None:
            self.answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if path == api or path.startswith(f"{api}/revision/"):
                revision = unquote(path.removeprefix(f"{api}/revision/")) if path != api else "main"
                if revision not in revisions:
                    return self.absent("RevisionNotFound")
                return self.as_json({"id": name, "sha": revision, "siblings": [], "tags": [], "downloads": 0})
            if path.startswith(f"{api}/tree/"):
                revision, folder = split(path.removeprefix(f"{api}/tree/"))
                deep = parse_qs(query).get("recursive", ["false"])[0].lower() == "true"
                found = entries(revisions[revision], folder, deep)
                return self.as_json(found) if found else self.absent("EntryNotFound")
            if path.startswith(f"/datasets/{name}/resolve/"):
                revision, file = split(path.removeprefix(f"/datasets/{name}/resolve/"))
                if file not in revisions[revision]:
                    return self.absent("EntryNotFound")
                data = revisions[revision][file]
                if wanted := self.headers.get("Range"):
                    first, last = wanted.removeprefix("bytes=").split("-")
                    begin, end = int(first), min(int(last), len(data) - 1)
                    return self.answer(
                        data[begin : end + 1], 206, {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
                    )
                return self.answer(data)
            return self.absent("RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            revision = unquote(self.path.rpartition("/")[2])
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            found = [entry for entry in entries(revisions[revision], "", True) if entry["path"] in wanted]
            self.as_json(found)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def split(path: str) -> tuple[str, str]:
    """(revision, path of a file) of what stands in a URL, where a revision's own separators are escaped."""
    revision, _, inner = path.partition("/")
    return unquote(revision), unquote(inner)


def entries(files: Mapping[str, bytes], folder: str, deep: bool) -> list[dict[str, Any]]:
    """The hub's entries of files and folders in a folder, or all below it."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        if folder and not path.startswith(f"{folder}/"):
            continue
        parts = path.removeprefix(f"{folder}/" if folder else "").split("/")
        for depth in range(1, len(parts) if deep else 2):
            inner = "/".join([*([folder] if folder else []), *parts[:depth]])
            if inner != path:
                found[inner] = {"type": "directory", "oid": "0", "size": 0, "path": inner}
        if deep or len(parts) == 1:
            oid = hashlib.sha1(data).hexdigest()
            found[path] = {"type": "file", "oid": oid, "size": len(data), "path": path}
    return list(found.values())
