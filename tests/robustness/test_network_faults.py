"""common/download.py against a server that sends any bytes: what it says about a file may be wrong.

Whatever a server does, a download ends with the served bytes or with one UserError. It never shows
a wrong file whose hash or size is known, and leaves nothing but a part that can be resumed.

    pytest -m slow tests/robustness/test_network_faults.py   5,000 random responses, two minutes
"""

import errno
import hashlib
import io
import random
import socket
import socketserver
import sys
import threading
import time
from email.utils import formatdate

import pytest

from common import download
from common.errors import UserError

BODY = random.Random(0).randbytes(5_000)
CHANGED = random.Random(1).randbytes(5_000)  # another version of the file
SHA256 = hashlib.sha256(BODY).hexdigest()
HASHES = pytest.mark.parametrize("sha256", [None, SHA256], ids=["no hash", "hash"])
TENTHS = range(0, len(BODY), len(BODY) // 10)


# A server -------------------------------------------------------------------------------------


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        head = {}
        for line in iter(self.rfile.readline, b"\r\n"):
            if not line:
                return
            name, _, value = line.decode("latin-1").partition(":")
            head[name.lower()] = value.strip()
        server = self.server
        server.requests.append(head)
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        self.wfile.write(answer(head) if callable(answer) else answer)
        if server.stalls:
            server.released.wait(10)


class Server(socketserver.ThreadingTCPServer):
    """Answers each request with the next of its `answers`, and the last one again and again.

    An answer is bytes, or a function from the request's headers to bytes. Then the server closes
    the connection, or if it `stalls`, keeps it open until it is `released`.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file.bin"
        self.reset()

    def reset(self):
        self.answers = []
        self.requests = []  # headers, by their names in lower case
        self.stalls = False
        self.released = threading.Event()

    def handle_error(self, request, client_address):
        pass  # the client has closed the connection


def response(headers, body=b"", status="200 OK"):
    """Return an HTTP response; a header may be repeated by giving a list of its values."""
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    for name, values in headers.items():
        for value in values if isinstance(values, list) else [values]:
            lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body):
    """Return a body in HTTP's chunks of 1,000 bytes: it says where it ends, but not its size."""
    chunks = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


def serve(content=BODY, etag='"1"', ranges=True, size="length", cut=None):
    """Return an answer: the content, or what a request with Range asks for.

    etag     None: the server sends none
    ranges   whether the server honors Range and If-Range
    size     length: Content-Length announces it; chunked; none: the body ends with the connection
    cut      the connection breaks after so many bytes of the body
    """

    def answer(head):
        headers, status, start = {}, "200 OK", 0
        if etag:
            headers["ETag"] = etag
        if ranges and "range" in head and head.get("if-range", etag) == etag:
            start = int(head["range"].removeprefix("bytes=").removesuffix("-"))
            status = "206 Partial Content"
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if size == "length":
            headers["Content-Length"] = len(body)
        if size == "chunked":
            headers["Transfer-Encoding"] = "chunked"
            body = chunked(body)
        return response(headers, body[:cut], status)

    return answer


@pytest.fixture
def waits(monkeypatch):
    """The seconds for which download() would have slept; it does not sleep."""
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


@pytest.fixture(scope="module")
def _running_server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(_running_server, monkeypatch, waits):
    """The server of all tests, without answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BLOCK", 100)
    _running_server.reset()
    yield _running_server
    _running_server.released.set()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "file.bin"


# Outcomes -------------------------------------------------------------------------------------


def fetch(url, target, sha256=None, any_part=False):
    """Download; return the error, one line, or None. Only a part that can be resumed may be left.

    A part must be of the true file or of CHANGED, its other version, unless it may be `any_part`.
    """
    error = None
    try:
        download.download(url, target, sha256)
    except UserError as raised:
        error = str(raised)
        assert len(error.splitlines()) == 1
    left = {path.name for path in target.parent.iterdir()}
    if error is None:
        assert left == {"file.bin"}
    else:
        assert left in (set(), {"file.bin.part"}, {"file.bin.part", "file.bin.part.etag"})
    if "file.bin.part" in left and not any_part:
        part = target.with_name("file.bin.part").read_bytes()
        assert BODY.startswith(part) or CHANGED.startswith(part)
    return error


def assert_refused(server, target, sha256=None):
    assert fetch(server.url, target, sha256) is not None
    assert not target.exists()


def assert_correct(server, target, sha256=None):
    assert fetch(server.url, target, sha256) is None
    assert target.read_bytes() == BODY


# Content-Range --------------------------------------------------------------------------------

START = 2_000  # bytes in the part
N = len(BODY)
WRONG_RANGES = {
    "none": {},
    "empty": {"Content-Range": ""},
    "unparsable": {"Content-Range": "banana"},
    "no total": {"Content-Range": f"bytes {START}-{N - 1}"},
    "another unit": {"Content-Range": f"lines {START}-{N - 1}/{N}"},
    "an earlier start": {"Content-Range": f"bytes {START - 1}-{N - 1}/{N}"},
    "a later start": {"Content-Range": f"bytes {START + 1}-{N - 1}/{N}"},
    "from 0": {"Content-Range": f"bytes 0-{N - 1}/{N}"},
    "an earlier end": {"Content-Range": f"bytes {START}-{N - 2}/{N}"},
    "a larger total": {"Content-Range": f"bytes {START}-{N - 1}/{N + 1}"},
    "a smaller total": {"Content-Range": f"bytes {START}-{N - 1}/{N - 1}"},
    "an unknown total": {"Content-Range": f"bytes {START}-{N - 1}/*"},
    "two ranges": {"Content-Range": f"bytes {START}-{N - 1}/{N}, bytes 0-1/{N}"},
    "another ETag": {"Content-Range": f"bytes {START}-{N - 1}/{N}", "ETag": '"2"'},
}


@pytest.fixture
def part(server, target):
    """A part of the first bytes of the file, and its ETag."""
    part = target.with_name("file.bin.part")
    part.write_bytes(BODY[:START])
    target.with_name("file.bin.part.etag").write_text('"1"')
    return part


def partial(headers, body):
    return response(headers | {"Content-Length": len(body)}, body, "206 Partial Content")


@HASHES
@pytest.mark.parametrize("headers", WRONG_RANGES.values(), ids=WRONG_RANGES.keys())
def test_a_206_with_a_wrong_content_range_is_never_accepted(server, target, part, headers, sha256):
    server.answers = [partial(headers, CHANGED[START:])]
    assert_refused(server, target, sha256)


@pytest.mark.parametrize("headers", WRONG_RANGES.values(), ids=WRONG_RANGES.keys())
def test_after_a_206_with_a_wrong_content_range_the_file_comes_whole(server, target, part, headers):
    server.answers = [partial(headers, CHANGED[START:]), serve()]
    assert_correct(server, target)
    assert "range" not in server.requests[-1]


@pytest.mark.parametrize(
    "content_range",
    [f"bytes 0-{START - 1}/{N}", f"bytes 0-{START - 1}/*", f"bytes {START}-{N - 1}/{N}"],
)
def test_a_206_that_was_not_asked_for_is_no_file(server, target, content_range):
    server.answers = [partial({"Content-Range": content_range}, BODY[:START])]
    assert_refused(server, target)


def test_a_416_that_was_not_asked_for_is_no_file(server, target):
    headers = {"Content-Range": "bytes */0", "Content-Length": 0}
    server.answers = [response(headers, status="416 Range Not Satisfiable")]
    assert_refused(server, target)


# Content-Length -------------------------------------------------------------------------------

WRONG_LENGTHS = {
    "a word": "banana",
    "empty": "",
    "negative": "-5",
    "a fraction": "5000.0",
    "10,000 digits": "9" * 10_000,
    "too large": N + 1,
    "two different ones": [N, N - 1],
}


@HASHES
@pytest.mark.parametrize("length", WRONG_LENGTHS.values(), ids=WRONG_LENGTHS.keys())
def test_a_wrong_content_length_is_refused(server, target, length, sha256):
    server.answers = [response({"Content-Length": length}, BODY)]
    assert_refused(server, target, sha256)


def test_a_content_length_that_is_too_small_is_refused_by_the_hash(server, target):
    server.answers = [response({"Content-Length": N - 1}, BODY)]
    assert_refused(server, target, SHA256)


# Broken connections ---------------------------------------------------------------------------


@HASHES
@pytest.mark.parametrize("etag", [None, '"1"'], ids=["no ETag", "ETag"])
@pytest.mark.parametrize("size", ["length", "chunked"])
@pytest.mark.parametrize("ranges", [False, True], ids=["no ranges", "ranges"])
def test_a_body_cut_at_any_tenth_is_completed(server, target, ranges, size, etag, sha256):
    for cut in TENTHS:
        options = {"ranges": ranges, "size": size, "etag": etag}
        server.answers = [serve(cut=cut, **options), serve(**options)]
        assert_correct(server, target, sha256)
        target.unlink()


def test_a_cut_body_without_a_size_is_refused_by_the_hash(server, target):
    for cut in TENTHS:
        server.answers = [serve(size="none", cut=cut)]
        assert_refused(server, target, SHA256)


@HASHES
def test_a_body_that_is_cut_ten_times_is_completed(server, target, sha256):
    server.answers = [serve(cut=len(BODY) // 10)]
    assert_correct(server, target, sha256)
    assert len(server.requests) == 10


def test_a_server_that_cuts_at_changing_places_without_ranges_is_given_up(server, target):
    cuts = [3_000, 2_000, 2_900]
    server.answers = [serve(ranges=False, cut=cut) for cut in 10 * cuts]
    assert_refused(server, target)
    assert len(server.requests) == 1 + download.RETRIES - 1


def test_a_server_that_stalls_is_given_up_with_the_part(server, target, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    server.stalls = True
    server.answers = [serve(cut=START), serve(cut=0)]
    begin = time.monotonic()
    assert "file.bin.part" in fetch(server.url, target)
    assert time.monotonic() - begin < 5
    assert len(server.requests) == 1 + download.RETRIES - 1


def test_a_server_that_says_nothing_is_given_up(server, target, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    server.stalls = True
    server.answers = [b""]
    assert_refused(server, target)


GARBAGE = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "random bytes": random.Random(2).randbytes(500),
    "a status that is no number": b"HTTP/1.1 abc\r\n\r\n",
    "a header without end": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000,
    "1,000 headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
    "a chunk of no size": response({"Transfer-Encoding": "chunked"}, b"banana\r\n"),
    "a body that is not gzip": response({"Content-Encoding": "gzip"}, BODY),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_instead_of_http_is_refused(server, target, garbage):
    server.answers = [garbage]
    assert_refused(server, target)


def test_a_refused_connection_is_retried(server, target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
        assert fetch(url, target) is not None


def test_a_body_without_end_is_refused(server, target, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", N - 1)
    server.answers = [serve(size="none")]
    assert_refused(server, target)
    assert len(server.requests) == 1
    assert list(target.parent.iterdir()) == []


def mutate(answer, rng):
    """Return an answer that replaces, deletes, inserts or repeats bytes of another one's head."""

    def mutated(head):
        content = answer(head)
        end = content.index(b"\r\n\r\n")
        for _ in range(rng.choice([1, 1, 2, 5])):
            start = rng.randrange(end)
            stop = start + rng.choice([0, 1, 1, 2, 10])
            new = rng.choice([b"", b"\r\n", rng.randbytes(1), b"9" * 20, 2 * content[start:stop]])
            content = content[:start] + new + content[stop:]
        return content

    return mutated


def check_random_responses(server, target, seeds):
    """Download from a server whose heads are altered at random, then from a good one."""
    for seed in seeds:
        rng = random.Random(seed)
        server.answers = []
        for _ in range(8):
            ranges, size = rng.random() < 0.7, rng.choice(["length", "length", "chunked", "none"])
            answer = serve(ranges=ranges, size=size, cut=rng.choice([None, *TENTHS]))
            server.answers.append(mutate(answer, rng))
        fetch(server.url, target, SHA256, any_part=True)
        server.answers = [serve()]
        error = None if target.exists() else fetch(server.url, target, SHA256, any_part=True)
        if error is not None:  # what had arrived was wrong; now it is deleted
            fetch(server.url, target, SHA256)
        assert target.read_bytes() == BODY, f"seed {seed}"
        target.unlink()


def test_random_responses_never_give_a_wrong_file(server, target):
    check_random_responses(server, target, range(40))


@pytest.mark.slow
def test_5000_random_responses_never_give_a_wrong_file(server, target):
    check_random_responses(server, target, range(5000))


# Redirects and URLs ---------------------------------------------------------------------------


def redirect(location):
    return response({"Location": location, "Content-Length": 0}, status="302 Found")


def test_a_relative_redirect_is_followed(server, target):
    server.answers = [redirect("other/file.bin"), serve()]
    assert_correct(server, target)


def test_a_redirect_without_a_location_is_refused_at_once(server, target):
    server.answers = [response({"Content-Length": 0}, status="302 Found")]
    assert_refused(server, target)
    assert len(server.requests) == 1


BAD_URLS = ["http://[bad", "http://a..b/", "file:///etc/passwd", "ftp://127.0.0.1/x"]


@pytest.mark.parametrize("location", BAD_URLS)
def test_a_redirect_to_what_cannot_be_downloaded_is_refused_at_once(server, target, location):
    server.answers = [redirect(location)]
    assert_refused(server, target)
    assert len(server.requests) == 1


def test_a_redirect_to_itself_is_refused_after_one_chain(server, target):
    server.answers = [redirect("/file.bin")]
    assert_refused(server, target)
    assert len(server.requests) <= 31


@pytest.mark.parametrize("url", [*BAD_URLS, "", "a/b", "http://", "http://a b/c", "http://a:port/"])
def test_an_invalid_url_is_refused_without_a_retry(server, target, waits, url):
    assert url in fetch(url, target)
    assert waits == []


# Statuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 400, 401, 403, 404, 410, 451])
def test_a_status_that_a_retry_would_not_change_is_refused_at_once(server, target, status):
    server.answers = [response({"Content-Length": 0}, status=f"{status} No")]
    assert str(status) in fetch(server.url, target)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_status_that_may_change_is_retried(server, target, status):
    server.answers = [response({"Content-Length": 0}, status=f"{status} No"), serve()]
    assert_correct(server, target)
    assert len(server.requests) == 2


# Retry-After, a number for the date that is so many seconds in the future, and the least and most
# seconds to wait
RETRY_AFTER = {
    "seconds": ("7", 7, 7),
    "a date": (100, 90, 100),
    "a date in the past": (-100, 1, 1),
    "absurd seconds": (str(10**9), 300, 300),
    "10,000 digits": ("9" * 10_000, 1, 300),
    "an absurd date": (10**9, 300, 300),
    "a date in an absurd time zone": (f"Mon, 01 Jan 2024 00:00:00 +{10**20}", 1, 1),
    "negative": ("-5", 1, 1),
    "a word": ("banana", 1, 1),
    "empty": ("", 1, 1),
}


@pytest.mark.parametrize(("text", "least", "most"), RETRY_AFTER.values(), ids=RETRY_AFTER.keys())
def test_retry_after_is_honored_within_bounds(server, target, waits, text, least, most):
    if not isinstance(text, str):
        text = formatdate(time.time() + text, usegmt=True)
    headers = {"Retry-After": text, "Content-Length": 0}
    server.answers = [response(headers, status="429 Too Many Requests"), serve()]
    assert_correct(server, target)
    assert len(waits) == 1
    assert least <= waits[0] <= most


# Other bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("etag", [None, '"2"', 'W/"2"', "2"])
@pytest.mark.parametrize("ranges", [False, True], ids=["no ranges", "ranges"])
def test_a_file_that_changes_between_two_attempts_is_not_mixed(server, target, ranges, etag):
    server.answers = [
        serve(CHANGED, etag and etag.replace("2", "1"), ranges=ranges, cut=START),
        serve(etag=etag, ranges=ranges),
    ]
    assert_correct(server, target)


def test_a_file_that_changes_without_etags_is_refused_by_the_hash(server, target):
    server.answers = [serve(CHANGED, etag=None, cut=START), serve(etag=None)]
    assert_refused(server, target, SHA256)
    assert_correct(server, target, SHA256)


def test_an_etag_of_an_earlier_part_is_not_that_of_a_new_one(server, target):
    without_etag = serve(CHANGED, etag=None, ranges=False, cut=START)
    server.answers = [serve(cut=START), without_etag, serve()]
    assert_correct(server, target)


def test_wrong_bytes_are_refused_by_the_hash(server, target):
    server.answers = [serve(CHANGED)]
    assert SHA256 in fetch(server.url, target, SHA256)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"no quotes", b'"1"\r\nX: y'])
def test_a_damaged_etag_file_makes_the_download_start_over(server, target, part, damage):
    target.with_name("file.bin.part.etag").write_bytes(damage)
    server.answers = [serve()]
    assert_correct(server, target)
    assert "range" not in server.requests[0]


# This machine ---------------------------------------------------------------------------------


def test_two_downloads_of_one_file_at_once_make_one_request(server, target, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    started, released = threading.Event(), threading.Event()

    def slow_answer(head):
        started.set()
        released.wait(10)
        return serve()(head)

    def start():
        thread = threading.Thread(target=download.download, args=(server.url, target))
        thread.start()
        return thread

    server.answers = [slow_answer]
    first = start()
    assert started.wait(10)
    second = start()
    deadline = time.monotonic() + 10
    while not stderr.getvalue() and time.monotonic() < deadline:
        second.join(0.01)
    released.set()
    first.join(10)
    second.join(10)
    assert str(target) in stderr.getvalue()  # the second one says that it waits
    assert target.read_bytes() == BODY
    assert len(server.requests) == 1
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


class FullDisk(io.FileIO):
    """A file on a disk that has room for START bytes."""

    def write(self, block):
        room = START - self.tell()
        super().write(block[:room])
        if len(block) > room:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_part_and_the_same_command_resumes(server, target, monkeypatch):
    server.answers = [serve()]
    with monkeypatch.context() as patch:
        patch.setattr(download, "open", FullDisk, raising=False)
        with pytest.raises(OSError, match="space"):
            download.download(server.url, target)
    assert target.with_name("file.bin.part").read_bytes() == BODY[:START]
    assert_correct(server, target)
    assert server.requests[-1]["range"] == f"bytes={START}-"
