"""A small Hugging Face hub on this machine, whose faults a test chooses."""

import hashlib
import http.server
import threading
import types

import pytest


class FakeHub:
    """The files and the faults of the hub, and the requests that it received."""

    def __init__(self, url):
        self.url = url
        self.files = {}  # path, without the first slash -> bytes
        self.requests = []  # (method, path)
        self.commit = "0123456789abcdef0123456789abcdef01234567"  # of all; None: it is no hub
        self.status = None  # of every response; None: 200, or 404 if there is no such file
        self.cuts = []  # bytes of the next bodies after which the connection breaks; None: it holds
        self.size_added = 0  # bytes added to the size that a response to HEAD announces
        self.cdn = None  # URL of another host that sends the files, as the hub's large ones

    def add(self, repository, name, content):
        """Serve a file of a repository; the name of a dataset's begins with datasets/."""
        self.files[f"{repository}/resolve/main/{name}"] = content

    def downloads(self):
        """Return the names of the files that were requested, without the requests for headers."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET"]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._send()

    def do_GET(self):
        self._send()

    def _send(self):
        hub = self.server.hub
        path = self.path.lstrip("/")
        hub.requests.append((self.command, path))
        content = hub.files.get(path.removeprefix("cdn/"))
        if hub.status:
            self._send_head(hub.status, {}, 0)
            return
        if content is None:
            self._send_head(404, {"X-Error-Code": "EntryNotFound"}, 0)
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if hub.commit:
            headers["X-Repo-Commit"] = hub.commit
        size = len(content)
        if self.command == "HEAD":
            size += hub.size_added
        if hub.cdn and self.command == "HEAD":
            headers["X-Linked-Etag"] = headers["ETag"]
            headers["X-Linked-Size"] = size
            headers["Location"] = f"{hub.cdn}/cdn/{path}"
            self._send_head(302, headers, 0)
            return
        self._send_head(200, headers, size)
        if self.command == "GET":
            self.wfile.write(content[: hub.cuts.pop(0) if hub.cuts else None])

    def _send_head(self, status, headers, size):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": size}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


def use_hub(monkeypatch, url, cache, offline=False):
    """Let huggingface_hub use a hub and a cache: it has read the environment when it was imported.

    It waits for nothing between two attempts.
    """
    import huggingface_hub.utils._http  # here, because it takes long and few tests need it
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    no_sleep = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(file_download, "time", no_sleep)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", no_sleep)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serve files on this machine in place of the hub; the cache is empty."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    use_hub(monkeypatch, server.hub.url, tmp_path / "cache/hub")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()
