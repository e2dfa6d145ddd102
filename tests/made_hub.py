"""A hub on loopback that serves one folder as the data set owner/name, and counts the bytes that it sends."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0" * 20
ID = "owner/name"


class Hub:
    """`endpoint` for HF_ENDPOINT; `sent`: bytes of each file that were sent so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: Counter[str] = Counter()
        self.endpoint = ""

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": "1" * 40, "size": path.stat().st_size, "path": name}


@contextmanager
def made_hub(folder: Path, ranges: bool = True) -> Iterator[Hub]:
    hub = Hub(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:  # paths-info
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            said: Any = json.loads(body) if body.startswith("{") else parse_qs(body)
            paths = said["paths"] if isinstance(said["paths"], list) else [said["paths"]]
            self.give([hub.entry(folder / one) for one in paths if (folder / one).exists()])

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/":
                self.give({})
            elif re.fullmatch(rf"/api/datasets/{ID}(/revision/(main|{COMMIT}))?", path):
                self.give({"id": ID, "sha": COMMIT, "siblings": []})
            elif found := re.fullmatch(rf"/api/datasets/{ID}/tree/[^/]+/?(.*)", path):
                deep = "recursive=true" in self.path.lower()
                below = folder / found[1]
                entries = sorted(below.rglob("*") if deep else below.glob("*"))
                self.give([hub.entry(one) for one in entries]) if below.is_dir() else self.missing()
            elif found := re.fullmatch(rf"/datasets/{ID}/resolve/[^/]+/(.*)", path):
                file = folder / found[1]
                self.file(found[1], file.read_bytes()) if file.is_file() else self.missing("EntryNotFound")
            else:
                self.missing()

        def file(self, name: str, content: bytes) -> None:
            part = re.fullmatch(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", "")) if ranges else None
            begin, end = (int(part[1]), int(part[2] or len(content)) + 1) if part else (0, len(content))
            body = content[begin:end]
            self.send_response(206 if part else 200)
            if part:
                self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{len(content)}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{len(content)}"')
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                hub.sent[name] += len(body)
                self.wfile.write(body)

        def give(self, answer: Any) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, code: str = "") -> None:
            self.send_response(404)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
