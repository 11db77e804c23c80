"""download.py against a server on this machine that breaks, lies and changes its files."""

import hashlib
import random
import socket

import pytest

from common import download
from common.download import hub_url
from common.errors import UserError

BODY = random.Random(0).randbytes(300_000)
CHANGED = random.Random(1).randbytes(300_000)  # the file after somebody changed it


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder" / "file.bin"


@pytest.fixture
def fetch(hub, target):
    """Download the hub's file.bin to `target`."""
    hub.files["file.bin"] = BODY
    return lambda sha256=None: download.download(hub_url("file.bin"), target, sha256)


@pytest.fixture
def part(hub, target, fetch):
    """What a download leaves that breaks in the middle while the server goes down."""
    hub.break_after, hub.statuses = 200_000, [200, *[503] * (download.RETRIES - 1)]
    with pytest.raises(UserError):
        fetch()
    hub.requests.clear()
    return target.with_name("file.bin.part")


def message(call, *args):
    """The one line with which a call refuses."""
    with pytest.raises(UserError) as refused:
        call(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_a_broken_connection_resumes_with_a_request_for_just_the_rest(hub, fetch, target):
    hub.break_after = 200_000
    fetch()
    (_, first), (_, second) = hub.requests
    had = int(second.removeprefix("bytes=").removesuffix("-"))
    assert first is None and 200_000 - download.BLOCK <= had <= 200_000 and had > 0
    assert target.read_bytes() == BODY


def test_an_interrupted_download_is_not_visible_under_the_final_name(part, target):
    assert not target.exists() and BODY.startswith(part.read_bytes())


def test_the_next_call_goes_on_from_the_part(hub, part, fetch, target):
    had = part.stat().st_size
    fetch()
    assert hub.requests == [("file.bin", f"bytes={had}-")]
    assert had > 0 and target.read_bytes() == BODY


def test_a_server_without_ranges_sends_all_again(hub, part, fetch, target):
    hub.ranges = False
    fetch()
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(
    "if_range", [True, False], ids=["server with If-Range", "server without If-Range"]
)
def test_a_changed_file_is_not_joined_with_the_old_part(hub, part, fetch, target, if_range):
    hub.files["file.bin"], hub.if_range = CHANGED, if_range
    hub.sha256["file.bin"] = None  # with a hash the mixture would be noticed anyway
    fetch()
    assert target.read_bytes() == CHANGED


def test_if_range_brings_a_changed_file_in_one_request(hub, part, fetch):
    hub.files["file.bin"] = CHANGED
    fetch()
    assert len(hub.requests) == 1


def test_a_part_that_is_complete_needs_no_more_bytes(hub, part, fetch, target):
    part.write_bytes(BODY)
    fetch()
    assert hub.requests == [("file.bin", f"bytes={len(BODY)}-")]
    assert target.read_bytes() == BODY


def test_a_complete_part_is_checked_against_the_hubs_hash(hub, part, fetch, target):
    part.write_bytes(CHANGED)
    assert "altered" in message(fetch)
    assert names(target.parent) == []


def test_a_part_longer_than_the_file_is_thrown_away(part, fetch, target):
    part.write_bytes(BODY + b"more")
    fetch()
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(hub, fetch, target, status):
    hub.statuses = [status] * (download.RETRIES - 1)
    fetch()
    assert len(hub.requests) == download.RETRIES and target.read_bytes() == BODY


def test_progress_refills_the_tries(hub, fetch, target):
    hub.break_after = 100_000
    hub.statuses = [503] * (download.RETRIES - 1) + [200] + [503] * (download.RETRIES - 2)
    fetch()
    assert target.read_bytes() == BODY


def test_the_waits_between_tries_double(hub, fetch, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    hub.statuses = [503] * download.RETRIES
    message(fetch)
    assert waits == [download.RETRY_WAIT * factor for factor in (1, 2, 4)]


def test_a_server_that_stays_busy_is_refused_with_its_status(hub, fetch):
    hub.statuses = [503] * download.RETRIES
    assert "503" in message(fetch)


def test_a_missing_file_is_refused_at_once_with_the_status(hub, fetch, target):
    hub.files.clear()
    assert "404" in message(fetch)
    assert len(hub.requests) == 1 and not target.parent.exists()


def test_bytes_other_than_the_hubs_hash_says_are_refused(hub, fetch, target):
    hub.sha256["file.bin"] = hashlib.sha256(CHANGED).hexdigest()
    told = message(fetch)
    assert hashlib.sha256(BODY).hexdigest() in told and hashlib.sha256(CHANGED).hexdigest() in told
    assert names(target.parent) == []


def test_bytes_other_than_the_given_hash_are_refused(hub, fetch, target):
    hub.sha256["file.bin"] = None
    assert "altered" in message(fetch, hashlib.sha256(CHANGED).hexdigest())
    assert names(target.parent) == []


def test_the_given_hash_lets_the_right_bytes_through(fetch, target):
    fetch(hashlib.sha256(BODY).hexdigest())
    assert target.read_bytes() == BODY


def test_a_server_that_announces_more_than_it_sends_is_refused(hub, fetch, target):
    hub.length_added, hub.ranges = 10, False
    message(fetch)
    assert not target.exists()


def test_a_server_that_announces_less_than_the_file_is_refused(hub, fetch, target):
    hub.length_added = -10
    assert "altered" in message(fetch)
    assert names(target.parent) == []


def test_no_server_is_refused_naming_the_url(hub, target):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"
        assert url in message(download.download, url, target)


def test_a_url_without_scheme_is_refused(hub, target):
    assert "localhost/file.bin" in message(download.download, "localhost/file.bin", target)


def test_the_message_of_a_broken_download_names_the_part_that_is_kept(hub, fetch, target):
    hub.break_after, hub.statuses = 200_000, [200, *[503] * (download.RETRIES - 1)]
    assert "file.bin.part" in message(fetch)


def test_hub_url_honours_hf_endpoint(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert (
        hub_url("gpt2/resolve/main/config.json")
        == "https://mirror.example/gpt2/resolve/main/config.json"
    )


def test_hub_url_is_hugging_face_without_hf_endpoint(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert (
        hub_url("gpt2/resolve/main/config.json")
        == "https://huggingface.co/gpt2/resolve/main/config.json"
    )


def test_file_sha256_is_hashlibs(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    assert download.file_sha256(tmp_path / "file") == hashlib.sha256(BODY).hexdigest()
