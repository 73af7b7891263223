"""A Hugging Face hub of one process, with models made on the spot, and a cache of its own."""

import contextlib
import hashlib
import http.server
import json
import threading

from huggingface_hub import constants

from qsharp_jax.models.hf import hub


class FakeHub:
    """Models as `commits[name][revision] = {file: bytes}`, and what is answered otherwise as `refusals[name]`.

    Attributes:
      requested: paths of the requests so far.
    """

    def __init__(self):
        self.branches: dict[str, dict[str, str]] = {}  # commit by branch, by model
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.requested: list[str] = []

    def push(self, name, files):
        """Make the files the model's main branch; returns the commit."""
        commit = hashlib.sha1(json.dumps({key: value.hex() for key, value in files.items()}).encode()).hexdigest()
        self.branches.setdefault(name, {})["main"] = commit
        self.commits.setdefault(name, {})[commit] = files
        return commit

    def answer(self, path):
        """Status, headers and body of a GET."""
        words = path.partition("?")[0].strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        if is_api and len(words) == 4:
            words += ["revision", "main"]
        if len(words) < 5:  # what else `huggingface_hub` asks of a hub
            return 404, {}, b"{}"
        owner, model, kind, revision, *file = words[2:] if is_api else words
        name = f"{owner}/{model}"
        if name in self.refusals:
            status, code = self.refusals[name]
            return status, {"X-Error-Code": code}, b"{}"
        if name not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = self.branches[name].get(revision, revision)
        if commit not in self.commits[name]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.commits[name][commit]
        if is_api and kind == "tree":
            entries = [{"type": "file", "path": key, "size": len(files[key]), "oid": "0" * 40} for key in files]
            return 200, {}, json.dumps(entries).encode()
        if is_api:
            siblings = [{"rfilename": key} for key in files]
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        body = files["/".join(file)]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, body


def forget():
    """Forget what this process knows of the hub, as a new process does."""
    hub._snapshot.cache_clear()


@contextlib.contextmanager
def running(cache, monkeypatch):
    """A hub that `huggingface_hub` of this process talks to, with an empty cache."""
    fake = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fake.requested.append(self.path)
            status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    forget()
    fake.stop = lambda: (server.shutdown(), server.server_close())
    try:
        yield fake
    finally:
        fake.stop()
        forget()


def put_into_cache(cache, name, files, commit="a" * 40):
    """A model in a cache, as a download leaves it; returns its folder."""
    root = cache / f"models--{name.replace('/', '--')}"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder
