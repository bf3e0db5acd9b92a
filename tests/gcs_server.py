"""Serves a folder as a bucket of Google Cloud Storage: what reading asks of its JSON API."""

import contextlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator


@contextlib.contextmanager
def bucket_of(folder: pathlib.Path) -> Iterator[str]:
    """Yield the address of a server whose every bucket has the files of `folder`, for TENSORSTORE_GCS_HTTP_URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            name = urllib.parse.unquote(url.path.partition("/o/")[2])
            if not name:
                start, end = query.get("startOffset", ""), query.get("endOffset")
                names = sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())
                found = [x for x in names if x >= start and (end is None or x < end)]
                return self.answer(200, json.dumps({"items": [{"name": x, "size": "0"} for x in found]}).encode())
            file = folder / name
            if not file.is_file():
                return self.answer(404, b"{}")
            content = file.read_bytes()
            if query.get("alt") != "media":
                about = {"name": name, "bucket": "any", "size": str(len(content)), "generation": "1"}
                about |= dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
                return self.answer(200, json.dumps(about | {"metageneration": "1"}).encode())
            if (wanted := self.headers.get("Range")) is None:
                return self.answer(200, content)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            end = min(int(last) + 1 if first and last else len(content), len(content))
            self.answer(206, content[start:end], f"bytes {start}-{end - 1}/{len(content)}")

        def answer(self, status: int, content: bytes, content_range: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-generation", "1")
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
