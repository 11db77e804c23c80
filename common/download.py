"""Download files: resume interrupted ones, verify size and hash, and show only complete files.

    download(hub_url("openai-community/gpt2/resolve/main/model.safetensors"), "model.safetensors")

HF_ENDPOINT names a mirror of the Hugging Face hub. requests honours the usual proxy variables.
"""

import hashlib
import os
import re
import time
from pathlib import Path

import requests
from tqdm import tqdm

from common.errors import UserError

BLOCK = 1 << 16  # bytes per read: what a broken connection loses at most
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken
RETRIES = 4  # attempts in a row without progress
RETRY_WAIT = 1.0  # seconds before the second attempt; doubled for each further one


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
    hub sends. Raises UserError if the file is not available or not what it should be.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        size_before = _size(part)
        try:
            size, hub_sha256 = _fetch(url, part, size_before)
            break
        except requests.RequestException as error:
            made_progress = _size(part) > size_before
            failures = 1 if made_progress else failures + 1
            if failures == RETRIES:
                raise UserError(_unreachable(url, part, error)) from error
            time.sleep(RETRY_WAIT * 2 ** (failures - 1))
    _verify(url, part, size, sha256 or hub_sha256)
    part.replace(path)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _unreachable(url, part, error):
    reason = type(error).__name__
    if error.response is not None:
        reason = f"status {error.response.status_code}"
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
    # The ETag identifies the version of the file, so that parts of two versions are never joined.
    etag_file = part.with_name(part.name + ".etag")
    etag = etag_file.read_text() if size_before and etag_file.exists() else None
    headers = {"Accept-Encoding": "identity"}
    if size_before:
        headers["Range"] = f"bytes={size_before}-"
    if etag:
        headers["If-Range"] = etag
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 429 or response.status_code >= 500:
            raise requests.HTTPError(response=response)
        sha256 = _hub_sha256(response)
        same_version = etag in (None, response.headers.get("ETag", etag))
        if response.status_code == 416 and same_version:
            if response.headers.get("Content-Range") == f"bytes */{size_before}":
                etag_file.unlink(missing_ok=True)
                return size_before, sha256  # the part is complete already
        if response.status_code == 416 or (response.status_code == 206 and not same_version):
            part.unlink()
            raise requests.ConnectionError("the part belongs to another version of the file")
        if not response.ok:
            raise UserError(f"{url}: the server answers {response.status_code} {response.reason}")
        start = size_before if response.status_code == 206 else 0
        length = response.headers.get("Content-Length")
        size = start + int(length) if length else None
        part.parent.mkdir(parents=True, exist_ok=True)  # only now that there is something to keep
        if "ETag" in response.headers:
            etag_file.write_text(response.headers["ETag"])
        bar = tqdm(
            total=size, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None
        )
        with open(part, "ab" if start else "wb") as file, bar:
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
    etag_file.unlink(missing_ok=True)
    return size or _size(part), sha256


def _hub_sha256(response):
    """Return the SHA-256 that the hub sends for large files, or None."""
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):
            return tag
    return None
