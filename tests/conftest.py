"""What several test files share: a working directory with a tiny dataset, a tiny run trained on it, a file server."""

import hashlib
import http.server
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch

import train
from common import download
from common.errors import UserError
from common.tokenizer import get_tokenizer

# Tiny tensors gain nothing from a second thread, and lose much where processes share the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300))
# Options of a run that takes two seconds: 12 steps of two micro-steps each, with dropout and clipping.
TINY = {
    "dataset": "tiny",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "dropout": 0.1,
}
TINY |= {
    "batch_size": 4,
    "total_batch_size": 128,
    "max_steps": 12,
    "warmup_steps": 3,
    "learning_rate": 0.01,
}
TINY |= {
    "min_lr": 0.001,
    "eval_interval": 5,
    "eval_tokens": 256,
    "checkpoint_interval": 4,
    "log_interval": 5,
}
TINY |= {"dtype": "float32", "device": "cpu", "grad_clip": 0.5, "out_dir": "out/tiny"}


def arguments(**options):
    """The command line of a tiny run, changed by options; None leaves one out."""
    return [f"--{name}={value}" for name, value in (TINY | options).items() if value is not None]


def write_dataset(folder, train_ids, val_ids, meta):
    folder.mkdir(parents=True)
    np.array(train_ids, dtype="<u2").tofile(folder / "train.bin")
    np.array(val_ids, dtype="<u2").tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps(meta))


def write_tiny(folder):
    """data/tiny in a folder: bytes of Python-like text."""
    ids = list(TEXT.encode())
    write_dataset(folder / "data" / "tiny", ids[:-600], ids[-600:], {"tokenizer": "byte"})


def refused(capsys, argv):
    """Run train.py with arguments that it must refuse; returns its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def decode(tokenizer, ids):
    """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
    return b"".join(tokenizer.decode_single_token_bytes(id) for id in ids).decode(
        "utf-8", errors="replace"
    )


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory with data/tiny, bytes of Python-like text."""
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def _trained(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("trained"), os.getcwd()
    write_tiny(folder)
    os.chdir(folder)
    train.main(arguments())
    os.chdir(before)
    return folder


@pytest.fixture
def tiny_run(_trained, workdir):
    """The finished tiny run, as out/tiny of the working directory."""
    shutil.copytree(_trained / "out", workdir / "out")
    return workdir / "out" / "tiny"


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    """GPT-2's tokenizer; the test is skipped where it cannot be had."""
    try:
        return get_tokenizer({"tokenizer": "gpt2"})
    except UserError as error:
        pytest.skip(str(error))


class Hub:
    """What the file server answers, and what it was asked."""

    def __init__(self):
        self.url = ""
        self.files = {}  # path, without the first slash -> bytes
        self.requests = []  # (path, its Range header or None)
        self.break_after = None  # bytes of a body after which the connection is dropped, once
        self.statuses = []  # statuses of the next answers; 200: as usual
        self.sha256 = {}  # path -> the SHA-256 to tell instead of the true one; None: tell none
        self.ranges = True  # whether Range is obeyed
        self.if_range = True  # whether If-Range is obeyed
        self.length_added = 0  # what Content-Length adds to the truth


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path, asked = self.server.hub, self.path.lstrip("/"), self.headers.get("Range")
        hub.requests.append((path, asked))
        status = hub.statuses.pop(0) if hub.statuses else 200
        if status != 200 or path not in hub.files:
            return self._head(404 if status == 200 else status, {"Content-Length": 0})
        body, start = hub.files[path], 0
        digest = hashlib.sha256(body).hexdigest()
        told, etag = hub.sha256.get(path, digest), f'"{digest[:16]}"'
        headers = {"ETag": etag} | ({"X-Linked-ETag": f'"{told}"'} if told else {})
        changed = hub.if_range and self.headers.get("If-Range", etag) != etag
        if asked and hub.ranges and not changed:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(body):
                return self._head(
                    416, headers | {"Content-Range": f"bytes */{len(body)}", "Content-Length": 0}
                )
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._head(status, headers | {"Content-Length": len(body) - start + hub.length_added})
        end, hub.break_after = hub.break_after, None
        self.wfile.write(body[start:] if end is None else body[start : start + end])

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A file server on this machine in the hub's place (HF_ENDPOINT); downloads retry without waiting."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub()
    server.hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_WAIT", 0.001)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()
