"""Google Cloud Storage for tests, as a process of its own: the package gcp-storage-emulator on a port of this machine.

    with gcs_emulator.running(folder) as gcs: ...      a process whose environment is gcs.environment uses it

TensorStore and google-cloud-storage can be told the address of another server. TensorFlow's file system cannot: its C++
code knows Google's alone. But it uses HTTPS_PROXY and CURL_CA_BUNDLE, so the emulator is also its proxy, which
answers for Google under a certificate of its own.

What our libraries need of the real service, and the package lacks or gets wrong, is mended in `main` and its helpers:
requests at the same time, generations, preconditions, startOffset and endOffset of listings, empty and chunked uploads.
"""

import contextlib
import functools
import http.server
import json
import pathlib
import signal
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, TypeVar

BUCKET = "bucket"
PRIVATE = "private"  # a bucket that nobody may read
GOOGLE = ("www.googleapis.com", "storage.googleapis.com")


class Emulator:
    """A running emulator. `bucket` is a google.cloud.storage Bucket, to look at what is in it and to change it."""

    def __init__(self, process: subprocess.Popen, port: int, certificate: pathlib.Path):
        from google.auth import credentials

        with warnings.catch_warnings(action="ignore", category=ImportWarning):  # it would like to have gRPC's messages
            from google.cloud import storage

        url = f"http://127.0.0.1:{port}"
        self.process = process
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "https_proxy": url,  # TensorFlow
            "CURL_CA_BUNDLE": str(certificate),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # else TensorFlow and TensorStore search for a login
        }
        anonymous = {"project": "any", "credentials": credentials.AnonymousCredentials()}
        self.bucket = storage.Client(**anonymous, client_options={"api_endpoint": url}).bucket(BUCKET)

    def names(self, prefix: str = "") -> list[str]:
        """The objects below a folder, without the empty ones that stand for folders."""
        names = [blob.name for blob in self.bucket.list_blobs(prefix=prefix)]
        return [name.removeprefix(prefix) for name in names if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        return self.bucket.blob(name).download_as_bytes()

    def write(self, name: str, content: str | bytes) -> None:
        self.bucket.blob(name).upload_from_string(content)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Answer every request with 403, as if the rights to the bucket had been taken away."""
        self.process.send_signal(signal.SIGUSR1)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGUSR2)


AnyEmulator = TypeVar("AnyEmulator", bound=Emulator)


@contextlib.contextmanager
def running(folder: pathlib.Path, kind: type[AnyEmulator] = Emulator) -> Iterator[AnyEmulator]:
    """Start an emulator with an empty bucket; its certificate and its log are written to `folder`."""
    with (folder / "emulator.log").open("w") as log:
        command = [sys.executable, __file__, str(folder / "certificate.pem")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline()
        assert port, (folder / "emulator.log").read_text()
        yield kind(process, int(port), folder / "certificate.pem")
    finally:
        process.kill()
        process.communicate()


# The process.


def main(certificate: str) -> None:
    import trustme
    from gcp_storage_emulator import server, storage
    from gcp_storage_emulator.handlers import buckets, objects

    authority = trustme.CA()
    authority.cert_pem.write_to_path(certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*GOOGLE).configure_cert(context)
    store = storage.Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, store)
    store.buckets[BUCKET]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}
    lock, refusing = threading.Lock(), threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: refusing.set())
    signal.signal(signal.SIGUSR2, lambda *_: refusing.clear())

    class Handler(server.RequestHandler):
        in_tunnel = False
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def do_CONNECT(self) -> None:
            if self.path.removesuffix(":443") not in GOOGLE:
                return self.send_error(HTTPStatus.FORBIDDEN)
            self.send_response_only(HTTPStatus.OK)
            self.end_headers()
            self.request, self.in_tunnel = context.wrap_socket(self.request, server_side=True), True
            self.setup()
            self.handle()

        def parse_request(self) -> bool:
            parsed = super().parse_request()
            if parsed and self.headers.get("Transfer-Encoding") == "chunked":
                del self.headers["Content-Length"]  # of the content, without the sizes of its chunks
            return parsed

        def answer(self) -> None:
            with lock:
                if f"/{PRIVATE}/" in self.path or refusing.is_set():
                    self.forbid()
                else:
                    server.Router(self).handle(self.command)

        def forbid(self) -> None:
            server._read_raw_data(self)
            content = json.dumps({"error": {"code": 403, "message": "the caller has no access"}}, indent=2).encode()
            self.send_response(HTTPStatus.FORBIDDEN)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def send_header(self, keyword: str, value: str) -> None:
            if self.in_tunnel and keyword == "Location":
                value = value.replace("http:", "https:", 1)
            super().send_header(keyword, value)

    def read_data(handler: Any, query: dict, read: Any = server._read_data) -> Any:
        content = read(handler, query)
        return b"" if content is None and query.get("uploadType") == ["media"] else content

    server._read_data = read_data
    for _, handlers in server.HANDLERS:
        for method, handle in handlers.items():
            handlers[method] = with_offsets(handle) if handle is objects.ls else with_preconditions(handle)
    server.HANDLERS = ((r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/storageLayout$", {"GET": layout}), *server.HANDLERS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, store)) as httpd:
        print(httpd.server_port, flush=True)
        httpd.serve_forever()


def layout(request: Any, response: Any, store: Any) -> None:
    """Say that a bucket has no real folders, which TensorFlow asks before it renames."""
    if store.get_bucket(request.params["bucket_name"]) is None:
        response.status = HTTPStatus.NOT_FOUND
    else:
        response.json({"kind": "storage#storageLayout", "hierarchicalNamespace": {"enabled": False}})


def with_offsets(ls: Any) -> Any:
    """List names from startOffset up to endOffset, exclusively."""

    def handle(request: Any, response: Any, store: Any, **options: Any) -> None:
        ls(request, response, store, **options)
        if response.status == HTTPStatus.OK:
            (first,), (end,) = request.query.get("startOffset", [""]), request.query.get("endOffset", ["\U0010ffff"])
            listing = json.loads(response._content)
            listing["items"] = [item for item in listing["items"] if first <= item["name"] < end]
            response.json(listing)

    return handle


def with_preconditions(handler: Any) -> Any:
    """Answer as the service does where an object has another generation than the request asks for; 0 is none.

    TensorStore needs to know which it has read.
    """

    def handle(request: Any, response: Any, store: Any, **options: Any) -> None:
        _ = request.data  # read it from the connection, which stays open
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        current = store.objects.get(request.params.get("bucket_name"), {}).get(name, {}).get("generation", "0")
        if request.query.get("ifGenerationMatch", [current]) != [current]:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [current]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, store, **options)
            response["x-goog-generation"] = current

    return handle


if __name__ == "__main__":
    main(*sys.argv[1:])
