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
from common.files import fsync, lock, read_text, write_text

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
    """Return the SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def download(url, path, sha256=None):
    """Download a URL to a path; an interrupted download, PATH.part, is continued.

    Verifies the size that the server announces and the SHA-256: the given one, or the one that the
    hub sends. Waits if another process downloads to the same path, and uses its file. Raises
    UserError if the file is not available or not what it should be.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    waited = False

    def report_wait():
        nonlocal waited
        waited = True
        print(f"waiting for another process that downloads {path}", file=sys.stderr, flush=True)

    with lock(path.with_name(path.name + ".lock"), on_busy=report_wait):
        if waited and path.exists():
            return
        size, hub_sha256 = _fetch_with_retries(url, part)
        _verify(url, part, size, sha256 or hub_sha256)
        fsync(part)
        part.replace(path)


def _fetch_with_retries(url, part):
    """Call _fetch until it succeeds, or has failed RETRIES times in a row without progress."""
    failures = 0
    while True:
        size_before = _size(part)
        try:
            return _fetch(url, part, size_before)
        except (ValueError, requests.TooManyRedirects) as error:
            raise UserError(f"{url} cannot be downloaded: {error}") from error
        except (requests.RequestException, HTTPError) as error:
            made_progress = _size(part) > size_before
            failures = 1 if made_progress else failures + 1
            if failures == RETRIES:
                raise UserError(_unreachable(url, part, error)) from error
            wait = RETRY_WAIT * 2 ** (failures - 1)
            time.sleep(max(wait, _retry_after(error)))


def _retry_after(error):
    """Return the seconds that a server asks to wait, at most MAX_RETRY_AFTER; 0 if it does not."""
    response = getattr(error, "response", None)
    text = "" if response is None else response.headers.get("Retry-After", "")
    if text.isdecimal():
        return min(int(text), MAX_RETRY_AFTER)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError):  # no header, or neither seconds nor a date
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
    part.unlink()
    expected = f"{size} bytes"
    if sha256:
        expected += f" with SHA-256 {sha256}"
    raise UserError(
        f"{url}: truncated or altered: received {actual_size} bytes with SHA-256 {actual_sha256}, "
        f"expected {expected}; try again"
    )


def _fetch(url, part, size_before):
    """Append what is missing to the part; return the full size and the hub's SHA-256 or None."""
    etag_file = part.with_name(part.name + ".etag")
    etag = _stored_etag(etag_file, part) if size_before else None
    size_before = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if size_before:
        headers["Range"] = f"bytes={size_before}-"
    if etag:
        headers["If-Range"] = etag
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise requests.HTTPError(response=response)
        sha256 = _hub_sha256(response)
        same_version = etag in (None, response.headers.get("ETag", etag))
        if response.status_code == 416 and same_version:
            if response.headers.get("Content-Range") == f"bytes */{size_before}":
                etag_file.unlink(missing_ok=True)
                return size_before, sha256  # the part is complete already
        if response.status_code == 416 or (response.status_code == 206 and not same_version):
            part.unlink(missing_ok=True)
            raise BadAnswer("the part belongs to another version of the file")
        if response.status_code not in (200, 206):
            raise UserError(f"{url}: the server answers {response.status_code} {response.reason}")
        start = size_before if response.status_code == 206 else 0
        size = _announced_size(response, start, part)
        if "ETag" in response.headers:
            write_text(etag_file, response.headers["ETag"])
        bar = tqdm(
            total=size, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None
        )
        with open(part, "ab" if start else "wb") as file, bar:
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
                if file.tell() > MAX_BYTES:
                    part.unlink()
                    raise UserError(f"{url} has no end: it sent more than {MAX_BYTES} bytes")
    etag_file.unlink(missing_ok=True)
    return size or _size(part), sha256


def _stored_etag(etag_file, part):
    """Return the ETag of the version that a part belongs to; None if the server sent none.

    It keeps parts of two versions from being joined. If it is damaged, the part is deleted.
    """
    if not etag_file.exists():
        return None
    etag = read_text(etag_file, errors="replace")
    if re.fullmatch(r'(W/)?"[!-~]*"', etag):
        return etag
    etag_file.unlink()
    part.unlink()
    return None


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
    match = re.fullmatch(rf"bytes {start}-(\d+)/(\d+|\*)", content_range)
    size = int(match[1]) + 1 if match and size is None else size
    if not match or size != int(match[1]) + 1 or match[2] not in ("*", str(size)):
        part.unlink(missing_ok=True)
        raise BadAnswer(f"bytes from {start} were asked for, Content-Range is {content_range!r}")
    return size


def _hub_sha256(response):
    """Return the SHA-256 that the hub sends for large files, or None."""
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):
            return tag
    return None
