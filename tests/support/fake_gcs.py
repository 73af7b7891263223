"""A bucket in memory behind Google Cloud Storage's JSON API, for the clients that the program uses: gcsfs and TensorStore.

An object is written whole or not at all, and may be asked to be new (`ifGenerationMatch=0`); it cannot be appended to or
copied. Moves, which the program is to do without but for a damaged checkpoint, are counted.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket:
    """Attributes:
    objects: contents by name, without the bucket's.
    writes: how often each was written.
    moves: names of objects that were moved to another name.
    refusals: a part of objects' names, and the HTTP status that reading these is refused with.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.writes: dict[str, int] = {}
        self.moves: list[str] = []
        self.refusals: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, dict, bytearray]] = {}
        self.lock = threading.RLock()
        self._generation = 1000

    def write(self, name: str, data: bytes, query: dict[str, str]) -> bool:
        """Write if the preconditions hold, and say so."""
        with self.lock:
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != self.generations.get(name, 0):
                return False
            self._generation += 1
            self.objects[name], self.generations[name] = bytes(data), self._generation
            self.writes[name] = self.writes.get(name, 0) + 1
            return True

    def delete(self, name: str, query: dict[str, str]) -> int:
        """The HTTP status."""
        with self.lock:
            if name not in self.objects:
                return 404
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != self.generations[name]:
                return 412
            del self.objects[name], self.generations[name]
            return 204


@contextlib.contextmanager
def serve(bucket: str) -> Iterator[tuple[Bucket, str]]:
    """A bucket of that name, and the URL of its server."""
    store = Bucket()
    handler = type("Handler", (_Handler,), {"store": store, "bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that has gone: gcsfs asks in two ways, and takes the first answer
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: Bucket
    bucket: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    # --- Requests -------------------------------------------------------------------------------------------------

    def _parse(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: items[0] for name, items in parse_qs(parts.query, keep_blank_values=True).items()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, body: bytes | dict = b"", headers: dict[str, str] | None = None) -> None:
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if status != 204 and status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)

    def _refuse(self, status: int, words: str) -> None:
        self._answer(status, {"error": {"code": status, "message": words, "errors": [{"message": words}]}})

    def do_GET(self) -> None:
        self._body()
        path, query = self._parse()
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path):
            return self._get(*map(unquote, match.groups()), query)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
            return self._list(unquote(match[1]), query)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            known = unquote(match[1]) == self.bucket
            return self._answer(200, {"name": self.bucket}) if known else self._refuse(404, "no such bucket")
        self._refuse(404, f"unknown path {path}")

    do_HEAD = do_GET

    def _get(self, bucket: str, name: str, query: dict[str, str]) -> None:
        with self.store.lock:
            data, generation = self.store.objects.get(name), self.store.generations.get(name, 0)
        for part, status in self.store.refusals.items():
            if part in name:
                return self._refuse(status, "refused")
        if bucket != self.bucket or data is None:
            return self._refuse(404, f"No such object: {bucket}/{name}")
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if "ifGenerationMatch" in query and query["ifGenerationMatch"] != str(generation):
            return self._refuse(412, "conditionNotMet")
        if query.get("alt") != "media":
            return self._answer(200, self._describe(name))
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(len(data) - int(match[2]), 0)
            end = min(int(match[2]) + 1, len(data)) if match[1] and match[2] else len(data)
            if first >= len(data):
                return self._refuse(416, "range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            return self._answer(206, data[first:end], headers)
        self._answer(200, data, headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        if bucket != self.bucket:
            return self._refuse(404, "no such bucket")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, behind = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        with self.store.lock:
            for name in sorted(self.store.objects):
                if not name.startswith(prefix) or name < first or (behind is not None and name >= behind):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self._describe(name))
        self._answer(200, {"items": items, "prefixes": sorted(prefixes)})

    def _describe(self, name: str) -> dict:
        with self.store.lock:
            return {
                "name": name, "bucket": self.bucket, "id": name, "size": str(len(self.store.objects.get(name, b""))),
                "generation": str(self.store.generations.get(name, 0)), "metageneration": "1",
                "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
                "contentType": "application/octet-stream", "etag": str(self.store.generations.get(name, 0)),
            }  # fmt: skip

    def do_POST(self) -> None:
        path, query = self._parse()
        if path.startswith("/session/"):
            return self.do_PUT()
        body = self._body()
        if path.startswith("/batch"):
            return self._batch(body)
        if match := re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)/moveTo/o/([^/]+)", path):
            name, target = map(unquote, match.groups())
            self.store.moves.append(name)
            self.store.write(target, self.store.objects[name], {})
            self.store.delete(name, {})
            return self._answer(200, self._describe(target))
        if not re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/[^/]+/o", path):
            return self._refuse(404, f"unknown path {path}")
        kind = query["uploadType"]
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            upload = str(len(self.store.uploads))
            self.store.uploads[upload] = (name, query, bytearray())
            return self._answer(200, headers={"Location": f"http://{self.headers['Host']}/session/{upload}"})
        if kind == "multipart":
            mark = b"--" + re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()
            head, data = body.split(mark)[1:3]
            name = json.loads(head.replace(b"\r\n", b"\n").split(b"\n\n", 1)[1])["name"]
            start = re.search(rb"\r?\n\r?\n", data).end()
            data = data[start:].removesuffix(b"\n").removesuffix(b"\r")
        else:
            name, data = query["name"], body
        self._write(name, data, query)

    def _write(self, name: str, data: bytes, query: dict[str, str]) -> None:
        if self.store.write(name, data, query):
            self._answer(200, self._describe(name))
        else:
            self._refuse(412, "conditionNotMet")

    def do_PUT(self) -> None:
        path, _ = self._parse()
        body = self._body()
        name, query, held = self.store.uploads[path.rsplit("/", 1)[1]]
        held += body
        if self.headers.get("Content-Range", "/*").endswith("/*") and body:
            return self._answer(308, headers={"Range": f"bytes=0-{len(held) - 1}"})
        self._write(name, bytes(held), query)

    def do_DELETE(self) -> None:
        self._body()
        path, query = self._parse()
        match = re.fullmatch(r"/(?:storage/v1/b/[^/]+/o|session)/(.+)", path)
        status = 204 if path.startswith("/session/") else self.store.delete(unquote(match[1]), query)
        self._answer(204) if status == 204 else self._refuse(status, "not deleted")

    def _batch(self, body: bytes) -> None:
        answers = []
        for name in re.findall(rb"DELETE /storage/v1/b/[^/]+/o/(\S+)", body):
            status = self.store.delete(unquote(name.decode().partition("?")[0]), {})
            answers.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{len(answers) + 1}>\r\n\r\n"
                f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(answers) + "--batch--\r\n"
        self._answer(200, text.encode(), {"Content-Type": "multipart/mixed; boundary=batch"})
