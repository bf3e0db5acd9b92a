"""A local server that speaks the part of the Hugging Face hub's API that down- and uploads use, for one repository."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
WRITER, READER = "hf_writer", "hf_reader"  # tokens; the second may not write
LARGE = (".safetensors", ".model")  # files that are uploaded by LFS


@contextlib.contextmanager
def serving(kind: str, name: str, files: dict[str, bytes], requests: list | None = None) -> Iterator[str]:
    """Serve `files` as the repository `name` of a kind, "models" or "datasets"; gives the address for HF_ENDPOINT.

    Args:
      files: without any the repository does not exist until it is created; uploads are added.
      requests: gets (path, first line of its JSON) of each request that writes.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(kind, name, files, requests))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(
    kind: str, repository: str, files: dict[str, bytes], requests: list | None
) -> type[http.server.BaseHTTPRequestHandler]:
    api = f"/api/{kind}/{repository}"
    prefix = f"{'' if kind == 'models' else '/' + kind}/{repository}"
    resolve = f"{prefix}/resolve/{SHA}/"
    settings = {"private": False}
    large: dict[str, bytes] = {}  # by SHA-256

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

        def answer(self, content, code=200):
            self.reply(json.dumps(content).encode(), code, Content_Type="application/json")

        def not_found(self):
            self.reply(b"", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

        @property
        def path_asked(self):
            return urllib.parse.unquote(urllib.parse.urlparse(self.path).path)

        @property
        def token(self):
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def do_GET(self):
            path = self.path_asked
            resolved = path.removeprefix(resolve)
            hashes = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
            if path == "/api/whoami-v2":
                is_valid = self.token in (WRITER, READER)
                self.answer({"name": "me"} if is_valid else {"error": "Invalid credentials"}, 200 if is_valid else 401)
            elif not files:
                self.not_found()
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.answer({"id": repository, "sha": SHA, "siblings": siblings, **settings})
            elif path.startswith(f"{api}/tree/"):
                self.answer([{"type": "file", "path": n, "size": len(x), "oid": hashes[n]} for n, x in files.items()])
            elif resolved in files:
                self.reply(files[resolved], ETag=f'"{hashes[resolved]}"', X_Repo_Commit=SHA)
            else:
                self.not_found()

        do_HEAD = do_GET

        def content(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def do_PUT(self):
            content = self.content()
            large[hashlib.sha256(content).hexdigest()] = content
            self.reply(b"")

        def do_POST(self):
            path, lines = self.path_asked, [json.loads(line) for line in self.content().splitlines()]
            body: dict[str, Any] = lines[0]
            if requests is not None:
                requests.append((path, body))
            if self.token != WRITER:
                self.answer({"error": "not permitted"}, 403 if self.token == READER else 401)
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                self.create(f"{body['organization']}/{body['name']}", body.get("visibility") == "private")
            elif path == f"{prefix}.git/info/lfs/objects/batch":
                place = f"http://{self.headers['Host']}/lfs"
                actions = [{**x, "actions": {"upload": {"href": f"{place}/{x['oid']}"}}} for x in body["objects"]]
                self.answer({"transfer": "basic", "objects": actions})
            elif not files or not path.startswith(f"{api}/"):
                self.not_found()
            elif path.startswith(f"{api}/branch/"):
                self.answer({})
            elif path.startswith(f"{api}/preupload/"):
                modes = [(file["path"], "lfs" if file["path"].endswith(LARGE) else "regular") for file in body["files"]]
                self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
            elif path.startswith(f"{api}/commit/"):
                for line in lines:
                    file = line["value"]
                    if line["key"] == "file":
                        files[file["path"]] = base64.b64decode(file["content"])
                    elif line["key"] == "lfsFile":
                        files[file["path"]] = large[file["oid"]]
                self.answer({"commitUrl": f"http://{self.headers['Host']}{prefix}/commit/{SHA}", "commitOid": SHA})
            else:
                self.not_found()

        def create(self, name, private):
            exists = bool(files)
            if name != repository:
                self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
                return
            if not exists:
                files[".gitattributes"] = b""
                settings["private"] = private
            self.answer({"url": f"http://{self.headers['Host']}/{name}"}, 409 if exists else 200)

    return Hub
