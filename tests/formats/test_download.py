"""common/download.py, against a server on this machine that breaks, lies and changes its files."""

import hashlib
import random
import socket

import pytest

from common import download
from common.download import hub_url
from common.errors import UserError

BODY = random.Random(0).randbytes(300_000)
CHANGED = random.Random(1).randbytes(300_000)  # another version of the file


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder" / "file.bin"


@pytest.fixture
def fetch(hub, target):
    """Return a function that downloads the hub's file.bin to `target`."""
    hub.files["file.bin"] = BODY
    return lambda sha256=None: download.download(hub_url("file.bin"), target, sha256)


def break_and_go_down(hub):
    """Let the server drop the connection after 200,000 bytes and then answer 503."""
    hub.break_after = 200_000
    hub.statuses = [200, *[503] * (download.RETRIES - 1)]


@pytest.fixture
def part(hub, target, fetch):
    """The part that an interrupted download leaves."""
    break_and_go_down(hub)
    with pytest.raises(UserError):
        fetch()
    hub.requests.clear()
    return target.with_name("file.bin.part")


def user_error(call, *args):
    """Return the message of the UserError that a call raises; it is one line."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_download_is_the_served_bytes(fetch, target):
    fetch()
    assert target.read_bytes() == BODY


def test_nothing_but_the_file_is_left(fetch, target):
    fetch()
    assert names(target.parent) == ["file.bin"]


def test_an_empty_file_can_be_downloaded(hub, fetch, target):
    hub.files["file.bin"] = b""
    fetch()
    assert target.read_bytes() == b""


def test_a_broken_connection_is_resumed_with_a_request_for_the_missing_bytes(hub, fetch, target):
    hub.break_after = 200_000
    fetch()
    ranges = [requested for _, requested in hub.requests]
    assert len(ranges) == 2
    assert ranges[0] is None
    size_before = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 200_000 - download.BLOCK <= size_before <= 200_000
    assert size_before > 0
    assert target.read_bytes() == BODY


def test_an_interrupted_download_is_not_visible_under_the_final_name(part, target):
    assert not target.exists()
    assert BODY.startswith(part.read_bytes())


def test_the_next_call_continues_the_part(hub, part, fetch, target):
    size_before = part.stat().st_size
    fetch()
    assert size_before > 0
    assert hub.requests == [("file.bin", f"bytes={size_before}-")]
    assert target.read_bytes() == BODY


def test_a_server_without_ranges_sends_the_whole_file_again(hub, part, fetch, target):
    hub.ranges = False
    fetch()
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(
    "if_range", [True, False], ids=["server with If-Range", "server without If-Range"]
)
def test_a_changed_file_is_not_joined_with_the_old_part(hub, part, fetch, target, if_range):
    hub.files["file.bin"] = CHANGED
    hub.if_range = if_range
    hub.sha256["file.bin"] = None  # a hash would reveal the mixture anyway
    fetch()
    assert target.read_bytes() == CHANGED


def test_a_server_with_if_range_sends_a_changed_file_in_one_request(hub, part, fetch):
    hub.files["file.bin"] = CHANGED
    fetch()
    assert len(hub.requests) == 1


def test_a_complete_part_needs_no_more_bytes(hub, part, fetch, target):
    part.write_bytes(BODY)
    fetch()
    assert hub.requests == [("file.bin", f"bytes={len(BODY)}-")]
    assert target.read_bytes() == BODY


def test_a_complete_part_with_another_hash_than_the_hub_sends_is_refused(part, fetch, target):
    part.write_bytes(CHANGED)
    message = user_error(fetch)
    assert sha256_of(CHANGED) in message
    assert sha256_of(BODY) in message
    assert names(target.parent) == []


def test_a_part_longer_than_the_file_is_discarded(part, fetch, target):
    part.write_bytes(BODY + b"more")
    fetch()
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_to_a_busy_server_is_repeated(hub, fetch, target, status):
    hub.statuses = [status] * (download.RETRIES - 1)
    fetch()
    assert len(hub.requests) == download.RETRIES
    assert target.read_bytes() == BODY


def test_progress_resets_the_number_of_attempts(hub, fetch, target):
    hub.break_after = 100_000
    hub.statuses = [503] * (download.RETRIES - 1) + [200] + [503] * (download.RETRIES - 2)
    fetch()
    assert target.read_bytes() == BODY


def test_the_waits_between_attempts_double(hub, fetch, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    hub.statuses = [503] * download.RETRIES
    user_error(fetch)
    assert waits == [download.RETRY_WAIT * factor for factor in (1, 2, 4)]


def test_a_server_that_stays_busy_is_refused_with_its_status(hub, fetch):
    hub.statuses = [503] * download.RETRIES
    assert "503" in user_error(fetch)


def test_a_missing_file_is_refused_at_once_with_the_status(hub, fetch, target):
    hub.files.clear()
    assert "404" in user_error(fetch)
    assert len(hub.requests) == 1
    assert not target.parent.exists()


def test_bytes_with_another_hash_than_the_hub_sends_are_refused_with_both(hub, fetch, target):
    hub.sha256["file.bin"] = sha256_of(CHANGED)
    message = user_error(fetch)
    assert sha256_of(BODY) in message
    assert sha256_of(CHANGED) in message
    assert names(target.parent) == []


def test_bytes_with_another_hash_than_the_given_one_are_refused_with_both(hub, fetch, target):
    hub.sha256["file.bin"] = None
    message = user_error(fetch, sha256_of(CHANGED))
    assert sha256_of(BODY) in message
    assert sha256_of(CHANGED) in message
    assert names(target.parent) == []


def test_bytes_with_the_given_hash_are_accepted(fetch, target):
    fetch(sha256_of(BODY))
    assert target.read_bytes() == BODY


def test_a_server_that_announces_more_than_it_sends_is_refused(hub, fetch, target):
    hub.length_added = 10
    hub.ranges = False
    user_error(fetch)
    assert not target.exists()


def test_a_server_that_announces_less_than_the_file_is_refused_with_the_size(hub, fetch, target):
    hub.length_added = -10
    assert str(len(BODY) - 10) in user_error(fetch)
    assert names(target.parent) == []


def test_a_url_without_a_server_is_refused_with_the_url(hub, target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
        assert url in user_error(download.download, url, target)


def test_a_url_without_a_scheme_is_refused_with_the_url(hub, target):
    assert "localhost/file.bin" in user_error(download.download, "localhost/file.bin", target)


def test_a_broken_download_is_refused_with_the_part_that_is_kept(hub, fetch):
    break_and_go_down(hub)
    assert "file.bin.part" in user_error(fetch)


CONFIG = "gpt2/resolve/main/config.json"


def test_hub_url_honours_hf_endpoint(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert hub_url(CONFIG) == f"https://mirror.example/{CONFIG}"


def test_hub_url_is_hugging_face_without_hf_endpoint(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub_url(CONFIG) == f"https://huggingface.co/{CONFIG}"


def test_file_sha256_is_that_of_hashlib(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    assert download.file_sha256(tmp_path / "file") == sha256_of(BODY)
