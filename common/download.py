"""Download files: resume interrupted ones, verify size and hash, and show only complete files.

    download(hub_url("openai-community/gpt2/resolve/main/model.safetensors"), "model.safetensors")

HF_ENDPOINT names a mirror of the Hugging Face hub. requests honours the usual proxy variables.
"""

import hashlib
import os
import re
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError  # some of them requests lets pass

from common.errors import UserError
from common.files import check_regular, fsync, lock, name_in_errors, read_text, write_text

BLOCK = 1 << 16  # bytes per read: what a broken connection loses at most
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken
RETRIES = 4  # attempts in a row without progress
RETRY_WAIT = 1.0  # seconds before the second attempt; doubled for each further one
MAX_RETRY_AFTER = 300  # seconds to wait at most if a server asks for it
MAX_BYTES = 1 << 37  # of a file: a server that never ends must not fill the disk


class BadAnswer(requests.RequestException):
    """A server contradicts itself; the next attempt may be better."""


def hub_url(path):
    """Return the URL of a file on the hub.

    path   REPO/resolve/main/FILE; for a dataset's file with datasets/ before it
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"{endpoint.rstrip('/')}/{path}"


def file_sha256(path):
    """Return the SHA-256 of a file, as hex digits. Raises UserError for a folder or a pipe."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def download(url, path, sha256=None, replace=False):
    """Download a URL to a path, unless it exists; an interrupted download, PATH.part, is continued.

    Verifies the size that the server announces and the SHA-256: the given one, or the one that the
    hub sends. Waits if another process downloads to the same path, and uses its file. Raises
    UserError if the file is not available or not what it should be.

    replace   download it also if it exists
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")

    def report_wait():
        print(f"waiting for another process that downloads {path}", file=sys.stderr, flush=True)

    with lock(path.with_name(path.name + ".lock"), on_busy=report_wait) as waited:
        if path.exists() and (waited or not replace):
            return
        check_regular(part)
        size, hub_sha256 = _fetch_with_retries(url, part, sha256)
        _verify(url, part, size, sha256 or hub_sha256)
        fsync(part)
        _etag_file(part).unlink(missing_ok=True)
        part.replace(path)


def _fetch_with_retries(url, part, sha256):
    """Call _fetch until it succeeds, or has failed RETRIES times in a row without progress."""
    failures = 0
    largest = _size(part)  # not the last size: a server without ranges starts over each time
    while True:
        try:
            return _fetch(url, part, sha256)
        except (ValueError, requests.TooManyRedirects) as error:
            raise UserError(f"{url} cannot be downloaded: {error}") from error
        except (requests.RequestException, HTTPError) as error:
            made_progress = _size(part) > largest
            largest = max(largest, _size(part))
            failures = 1 if made_progress else failures + 1
            if failures == RETRIES:
                if not _can_be_resumed(part, sha256):
                    _discard(part)
                raise UserError(_unreachable(url, part, error)) from error
            wait = RETRY_WAIT * 2 ** (failures - 1)
            time.sleep(max(wait, _retry_after(error)))


def _retry_after(error):
    """Return the seconds that a server asks to wait, at most MAX_RETRY_AFTER; 0 if it does not."""
    response = getattr(error, "response", None)
    text = "" if response is None else response.headers.get("Retry-After", "")
    try:
        if text.isdecimal():
            seconds = int(text)
        else:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):  # no header, or neither seconds nor a date
        return 0
    return min(max(seconds, 0), MAX_RETRY_AFTER)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _unreachable(url, part, error):
    reason = type(error).__name__
    response = getattr(error, "response", None)
    if response is not None:
        reason = f"status {response.status_code}"
    elif isinstance(error, BadAnswer):
        reason = str(error)
    message = f"no answer from {url} in {RETRIES} attempts ({reason})"
    if part.exists():
        message += f"; {part} keeps what arrived, and the same command resumes the download"
    return message


def _verify(url, part, size, sha256):
    """Delete the part and raise UserError unless it has this size and hash (None: any hash)."""
    actual_size, actual_sha256 = _size(part), file_sha256(part)
    if actual_size == size and sha256 in (None, actual_sha256):
        return
    _discard(part)
    expected = f"{size} bytes"
    if sha256:
        expected += f" with SHA-256 {sha256}"
    raise UserError(
        f"{url}: truncated or altered: received {actual_size} bytes with SHA-256 {actual_sha256}, "
        f"expected {expected}; try again"
    )


def _fetch(url, part, sha256):
    """Append what is missing to the part; return the full size and the hub's SHA-256 or None."""
    if not _can_be_resumed(part, sha256):
        _discard(part)
    etag = _stored_etag(part)
    size_before = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if size_before:
        headers["Range"] = f"bytes={size_before}-"
    if etag:
        headers["If-Range"] = etag
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise requests.HTTPError(response=response)
        hub_sha256 = _hub_sha256(response)
        same_version = etag in (None, response.headers.get("ETag", etag))
        if size_before and (status == 416 or (status == 206 and not same_version)):
            content_range = response.headers.get("Content-Range")
            if status == 416 and same_version and content_range == f"bytes */{size_before}":
                return size_before, hub_sha256  # the part is complete already
            _discard(part)
            raise BadAnswer("the part belongs to another version of the file")
        if status not in (200, 206):
            raise UserError(f"{url}: the server answers {status} {response.reason}")
        start = size_before if status == 206 else 0
        size = _announced_size(response, start, part)
        if start == 0:
            part.unlink(missing_ok=True)  # bytes of an old version never lie beside a new ETag
        if "ETag" in response.headers:
            write_text(_etag_file(part), response.headers["ETag"])
        elif start == 0:
            _etag_file(part).unlink(missing_ok=True)  # of an earlier part
        bar = tqdm(
            total=size, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None
        )
        with name_in_errors(part), open(part, "ab" if start else "wb") as file, bar:
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
                if file.tell() > MAX_BYTES:
                    _discard(part)
                    raise UserError(f"{url} has no end: it sent more than {MAX_BYTES} bytes")
    return _size(part) if size is None else size, hub_sha256


def _etag_file(part):
    return part.with_name(part.name + ".etag")


def _stored_etag(part):
    """Return the ETag of the version that a part belongs to; None if it is unknown or damaged."""
    etag_file = _etag_file(part)
    if not etag_file.exists() or _size(part) == 0:
        return None
    etag = read_text(etag_file, errors="replace")
    return etag if re.fullmatch(r'(W/)?"[!-~]*"', etag) else None


def _can_be_resumed(part, sha256):
    """Return whether an ETag, or later the hash, would show that the rest is of another version."""
    return sha256 is not None or _stored_etag(part) is not None


def _discard(part):
    part.unlink(missing_ok=True)
    _etag_file(part).unlink(missing_ok=True)


def _announced_size(response, start, part):
    """Return the size of the whole file by the headers of an answer; None if they do not say.

    Raises BadAnswer if the answer does not begin at `start`, after deleting the part.
    """
    length = response.headers.get("Content-Length")
    if length is not None and not length.isdecimal():
        raise BadAnswer(f"Content-Length is {length!r}")
    size = start + int(length) if length else None
    if response.status_code != 206:
        return size
    content_range = response.headers.get("Content-Range", "")
    # Without a total, "*", nothing shows whether the range reaches the end of the file.
    match = re.fullmatch(rf"bytes {start}-(\d+)/(\d+)", content_range)
    if match and int(match[1]) + 1 == int(match[2]) and size in (None, int(match[2])):
        return int(match[2])
    _discard(part)
    raise BadAnswer(f"bytes from {start} were asked for, Content-Range is {content_range!r}")


def _hub_sha256(response):
    """Return the SHA-256 that the hub sends for large files, or None."""
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):
            return tag
    return None
