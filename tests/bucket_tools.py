"""A bucket for tests, in a process of its own: what gcsfs, TensorStore and Orbax use of Google Cloud Storage."""

import base64
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

NAME = "bucket"


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket; while the fixture lives, new processes find it through the environment too."""
    server = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        host = f"http://localhost:{int(server.stdout.readline())}"
        settings = {
            "STORAGE_EMULATOR_HOST": host,
            "TENSORSTORE_GCS_HTTP_URL": host,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # of zonal buckets
        }
        with mock.patch.dict(os.environ, settings):
            yield f"gs://{NAME}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket_folder(bucket: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The path of a folder of the bucket that is the test's own, with a cache of local copies of its own."""
    from runtime_jax.files import buckets, path_of

    monkeypatch.setattr(buckets, "CACHE", tmp_path / "cache")
    return path_of(f"{bucket}/{re.sub(r'[^a-z0-9]+', '_', request.node.name)}")


class Object(NamedTuple):
    """An object and its version."""

    data: bytes
    generation: int
    created: str

    def describe(self, name: str) -> dict[str, Any]:
        """The object resource of the JSON API."""
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "timeCreated": self.created,
            "updated": self.created,
            "etag": str(self.generation),
            "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
        }


class Refused(Exception):
    """A request that is answered by this status."""


class Handler(BaseHTTPRequestHandler):
    """Answers https://cloud.google.com/storage/docs/json_api, version 1."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, else each answer takes 40 ms
    objects: dict[str, Object] = {}  # noqa: RUF012 (one bucket for all requests)
    uploads: dict[str, tuple[str, bytes]] = {}  # noqa: RUF012
    generations = itertools.count(1_700_000_000_000_000)
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def handle_any(self) -> None:
        """Reads a request, answers it."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        try:
            with self.lock:
                status, headers, data = self.answer(self.command, url.path, query, body)
        except Refused as refused:
            status, headers, data = refused.args[0], {}, json.dumps({"error": {"message": str(refused)}}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if status != 304:
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        """Status, headers and body."""
        if path.startswith("/batch/"):
            return self.batch(body)
        if path.startswith("/resumable/"):
            return self.resume(path.rpartition("/")[2], body)
        source, _, target = path.partition("/rewriteTo/")
        found = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?", source)
        if found is None:
            raise Refused(400)
        if found[1] != NAME:
            raise Refused(404)
        name = unquote(found[2] or "")
        if path.startswith("/upload/"):
            return self.upload(query, body)
        if target:
            new = self.put(unquote(target.rpartition("/")[2]), self.get(name).data, {})
            return self.json({"done": True, "resource": new})
        if method == "DELETE":
            self.get(name)
            self.check(name, query)
            del self.objects[name]
            return 204, {}, b""
        if name:
            return self.read(name, query)
        return self.json(self.list(query) if path.endswith("/o") else {"name": NAME})

    def json(self, fields: dict[str, Any]) -> tuple[int, dict, bytes]:
        """A JSON answer."""
        return 200, {}, json.dumps(fields).encode()

    def get(self, name: str) -> Object:
        """The object of that name."""
        if name not in self.objects:
            raise Refused(404)
        return self.objects[name]

    def check(self, name: str, query: dict[str, str]) -> None:
        """Conditions on the object's version; 0: there is none."""
        generation = str(self.objects[name].generation) if name in self.objects else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise Refused(412)
        if query.get("ifGenerationNotMatch") == generation:
            raise Refused(304)

    def put(self, name: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
        """Writes an object; its resource."""
        self.check(name, query)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.objects[name] = Object(data, next(self.generations), now)
        return self.objects[name].describe(name)

    def upload(self, query: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        """A simple, multipart or resumable upload."""
        if query["uploadType"] == "media":
            return self.json(self.put(query["name"], body, query))
        if query["uploadType"] == "resumable":
            self.check(query["name"], query)
            number = str(next(self.generations))
            self.uploads[number] = query["name"], b""
            return 200, {"Location": f"http://{self.headers['Host']}/resumable/{number}"}, b""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        fields, content = (part.partition(b"\n\n")[2] for part in body.split(b"--" + boundary)[1:3])
        return self.json(self.put(json.loads(fields)["name"], content.removesuffix(b"\n"), query))

    def resume(self, number: str, body: bytes) -> tuple[int, dict, bytes]:
        """A part of a resumable upload."""
        name, data = self.uploads[number]
        data += body
        self.uploads[number] = name, data
        whole = self.headers["Content-Range"].rpartition("/")[2]
        if whole == "*" or int(whole) > len(data):
            return 308, {"Range": f"bytes=0-{len(data) - 1}"}, b""
        return self.json(self.put(name, data, {}))

    def read(self, name: str, query: dict[str, str]) -> tuple[int, dict, bytes]:
        """An object's resource, or its bytes."""
        found = self.get(name)
        self.check(name, query)
        if query.get("alt") != "media":
            return self.json(found.describe(name))
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(found.generation)}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(found.data)), len(found.data) - 1)
            if first > last:
                raise Refused(416)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(found.data)}"
            return 206, headers, found.data[first : last + 1]
        return 200, headers, found.data

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        """Objects, and what stands for folders; in pages of two hundred, so that pages are tested too."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        names = sorted(name for name in self.objects if name.startswith(prefix) and name > query.get("pageToken", ""))
        page = names[: min(int(query.get("maxResults", 200)), 200)]
        for name in page:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.objects[name].describe(name))
        more = {"nextPageToken": page[-1]} if len(page) < len(names) else {}
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)} | more

    def batch(self, body: bytes) -> tuple[int, dict, bytes]:
        """Several deletions."""
        parts = []
        for name in re.findall(rb"DELETE /storage/v1/b/[^/]+/o/([^ ?]+)", body):
            there = self.objects.pop(unquote(name.decode()), None)
            parts.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {204 if there else 404} -\r\n\r\n")
        return 200, {"Content-Type": "multipart/mixed; boundary=part"}, ("".join(parts) + "--part--").encode()


class Server(ThreadingHTTPServer):
    """Threads that answer; a client that is killed is no error."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints other errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


if __name__ == "__main__":
    server = Server(("localhost", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
