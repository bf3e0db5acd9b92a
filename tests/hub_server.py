"""A local server that speaks the part of the Hugging Face hub's API that a download uses, for one repository."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(kind: str, name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve `files` as the repository `name` of a kind, "models" or "datasets"; gives the address for HF_ENDPOINT."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(kind, name, files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(kind: str, repository: str, files: Mapping[str, bytes]) -> type[http.server.BaseHTTPRequestHandler]:
    hashes = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
    api = f"/api/{kind}/{repository}"
    resolve = f"{'' if kind == 'models' else '/' + kind}/{repository}/resolve/{SHA}/"

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def reply(self, body, code=200, **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            resolved = path.removeprefix(resolve)
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.reply(json.dumps({"id": repository, "sha": SHA, "siblings": siblings}).encode())
            elif path.startswith(f"{api}/tree/"):
                listed = [{"type": "file", "path": n, "size": len(x), "oid": hashes[n]} for n, x in files.items()]
                self.reply(json.dumps(listed).encode())
            elif resolved in files:
                self.reply(files[resolved], ETag=f'"{hashes[resolved]}"', X_Repo_Commit=SHA)
            else:
                self.reply(b"", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

        do_HEAD = do_GET

    return Hub
