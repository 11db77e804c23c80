"""common/hub.py: huggingface_hub against a small hub on this machine that fails in many ways."""

import logging
import logging.handlers
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused
from hub import use_hub

import prepare_data
from common.errors import UserError
from common.hub import cached_file, download

ROOT = Path(__file__).parents[2]
NAME = "model.safetensors"
BODY = random.Random(0).randbytes(30_000)


@pytest.fixture
def cache(hub, tmp_path):
    """The folder of the cache; the hub serves BODY as a model and as a dataset's file."""
    hub.add("owner/model", NAME, BODY)
    hub.add("datasets/owner/data", "shard.bin", BODY)
    return tmp_path / "cache/hub"


@pytest.fixture
def unused_url():
    """The URL of a server that refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


def download_error(repository="owner/model", name=NAME, **options):
    """Return the message of the UserError that a download raises; it is one line."""
    with pytest.raises(UserError) as error:
        download(repository, name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder):
    """Return the files below a folder that look like a download: large, with a final name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    final = [path for path in files if path.suffix != ".incomplete"]
    return [path.name for path in final if path.stat().st_size > 1000]


# Downloads ------------------------------------------------------------------------------------


def test_a_download_is_the_served_bytes_in_the_cache(cache):
    path = download("owner/model", NAME)
    assert path.read_bytes() == BODY
    assert path.is_relative_to(cache / "models--owner--model/snapshots")


def test_a_file_is_downloaded_once(cache, hub):
    assert download("owner/model", NAME) == download("owner/model", NAME)
    assert hub.downloads() == [NAME]


def test_a_file_of_a_dataset_can_be_downloaded_to_a_directory(cache, tmp_path):
    path = download("owner/data", "shard.bin", repo_type="dataset", local_dir=tmp_path / "here")
    assert path == tmp_path / "here/shard.bin"
    assert path.read_bytes() == BODY


def test_a_file_can_come_from_another_host_as_large_ones_do(cache, hub):
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")
    assert download("owner/model", NAME).read_bytes() == BODY
    assert hub.requests[-1] == ("GET", f"cdn/owner/model/resolve/main/{NAME}")


# The cache ------------------------------------------------------------------------------------


def test_a_cached_file_is_found_without_a_request(cache, hub):
    path = download("owner/model", NAME)
    hub.requests.clear()
    assert cached_file("owner/model", NAME) == path
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repository", "name"),
    [("owner/model", "other"), ("owner/other", NAME), ("out/some/run", NAME), ("", NAME)],
)
def test_a_file_that_is_not_cached_is_none(cache, hub, repository, name):
    download("owner/model", NAME)
    hub.requests.clear()
    assert cached_file(repository, name) is None
    assert hub.requests == []


def test_a_cached_file_serves_while_the_hub_fails(cache, hub):
    path = download("owner/model", NAME)
    hub.status = 503
    assert download("owner/model", NAME) == path


def test_a_cached_file_serves_without_a_network(cache, monkeypatch, unused_url):
    path = download("owner/model", NAME)
    use_hub(monkeypatch, unused_url, cache)
    assert download("owner/model", NAME) == path


def test_a_cached_file_serves_offline(cache, hub, monkeypatch):
    path = download("owner/model", NAME)
    hub.requests.clear()
    use_hub(monkeypatch, hub.url, cache, offline=True)
    assert download("owner/model", NAME) == path
    assert hub.requests == []


# Failures -------------------------------------------------------------------------------------

FAILURES = {  # the faults of the hub, and what the error says
    "not found": ({"files": {}}, "404"),
    "no such repository": ({"status": 404}, "404"),
    "no hub": ({"commit": None}, "does not seem"),
    "unauthorized": ({"status": 401}, "401"),
    "forbidden": ({"status": 403}, "403"),
    "busy": ({"status": 429}, "429"),
    "a server error": ({"status": 500}, "500"),
    "a connection that breaks": ({"cuts": [0] * 20}, "Error"),
    "fewer bytes than announced": ({"size_added": 10}, str(len(BODY) + 10)),
    "more bytes than announced": ({"size_added": -10}, str(len(BODY) - 10)),
}


@pytest.mark.parametrize(("faults", "word"), FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("local_dir", [None, "here"], ids=["cache", "directory"])
def test_a_failure_is_one_line_and_leaves_no_file(
    cache, hub, tmp_path, monkeypatch, faults, word, local_dir
):
    monkeypatch.chdir(tmp_path)
    for fault, value in faults.items():
        setattr(hub, fault, value)
    message = download_error(local_dir=local_dir)
    assert all(part in message for part in ("owner/model", NAME, hub.url, word))
    assert "HF_ENDPOINT" in message
    assert contents(tmp_path) == []


def test_after_a_failure_the_next_download_is_complete(cache, hub):
    hub.cuts = [20_000] * 20
    download_error()
    hub.cuts = []
    assert download("owner/model", NAME).read_bytes() == BODY


def test_a_hub_without_an_answer_is_refused_with_its_url(cache, monkeypatch, unused_url):
    use_hub(monkeypatch, unused_url, cache)
    message = download_error()
    assert unused_url in message
    assert "HF_ENDPOINT" in message


@pytest.mark.parametrize("url", ["localhost", "http://127.0.0.1:x"])
def test_an_endpoint_that_is_no_url_is_refused_with_it(cache, monkeypatch, url):
    use_hub(monkeypatch, url, cache)
    assert url in download_error()


def test_offline_a_missing_file_is_refused_with_the_variables(cache, hub, monkeypatch):
    use_hub(monkeypatch, hub.url, cache, offline=True)
    message = download_error()
    assert all(part in message for part in (str(cache), "HF_HUB_OFFLINE", "HF_HOME"))
    assert hub.requests == []


def test_a_failing_disk_is_not_taken_for_a_failing_hub(cache, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"):
        download("owner/model", NAME, local_dir=tmp_path / "file/here")


@pytest.fixture
def library_log():
    """The records that huggingface_hub logs."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    handler = logging.handlers.BufferingHandler(capacity=1000)
    logger.addHandler(handler)
    yield handler.buffer
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("faults", [{"status": 503}, {"cuts": [0] * 20}])
def test_the_library_does_not_log_its_attempts(cache, hub, library_log, faults):
    for fault, value in faults.items():
        setattr(hub, fault, value)
    download_error()
    assert library_log == []


def test_after_a_download_the_library_logs_as_before(cache, library_log):
    logger = logging.getLogger("huggingface_hub")
    logger.setLevel(logging.INFO)
    download("owner/model", NAME)
    assert logger.level == logging.INFO


# The environment ------------------------------------------------------------------------------


def run(*argv, **environment):
    """Run Python with variables of the environment; return the completed process."""
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_a_process_uses_the_endpoint_and_the_home_of_its_environment(cache, hub, tmp_path):
    code = f"from common import hub; print(hub.download('owner/model', '{NAME}'))"
    completed = run("-c", code, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert completed.returncode == 0, completed.stderr
    path = Path(completed.stdout.strip())
    assert path.is_relative_to(tmp_path / "home/hub")
    assert path.read_bytes() == BODY


def test_a_process_is_offline_if_its_environment_says_so(cache, hub, tmp_path):
    code = f"from common import hub; hub.download('owner/model', '{NAME}')"
    completed = run("-c", code, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "UserError" in completed.stderr
    assert "HF_HUB_OFFLINE" in completed.stderr
    assert hub.requests == []


def test_preparing_fineweb_offline_is_refused_and_leaves_no_file(
    cache, hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    use_hub(monkeypatch, hub.url, cache, offline=True)
    assert "HF_HUB_OFFLINE" in refused(capsys, ["fineweb"], prepare_data.main)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
