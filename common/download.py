"""Downloads that can be trusted: resumed where they broke, checked for size and hash, visible only when complete.

    download(hub_url("openai-community/gpt2/resolve/main/model.safetensors"), "data/pretrained/gpt2/model.safetensors")

HF_ENDPOINT names a mirror of the Hugging Face hub; the usual proxy variables are honoured (requests does that).
"""

import hashlib
import os
import re
import time
from pathlib import Path

import requests
from tqdm import tqdm

from common.errors import UserError

BLOCK = 1 << 16  # bytes at a time: what a broken connection loses at most
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken
RETRIES, RETRY_WAIT = (
    4,
    1.0,
)  # tries in a row without progress; seconds before the second, doubled from then on


def hub_url(path):
    """URL of a file on the hub; path is REPO/resolve/main/FILE, with datasets/ before it for a dataset's."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{path}"


def file_sha256(path):
    """SHA-256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def download(url, path, sha256=None):
    """Fetch a URL to a path; what an interrupted download left in PATH.part is continued.

    Checked are the size that the server tells, and the SHA-256: the one given, or the one that the hub sends along.
    UserError where the file cannot be had, or is not what it should be.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        had = part.stat().st_size if part.exists() else 0
        try:
            size, told = _fetch(url, part, had)
            break
        except requests.RequestException as error:
            grown = part.exists() and part.stat().st_size > had
            failures = 1 if grown else failures + 1
            if failures == RETRIES:
                kept = (
                    f"; {part} keeps what came, and the same command goes on from there"
                    if part.exists()
                    else ""
                )
                why = (
                    type(error).__name__
                    if error.response is None
                    else f"status {error.response.status_code}"
                )
                raise UserError(f"no answer from {url} in {RETRIES} tries ({why}){kept}") from error
            time.sleep(RETRY_WAIT * 2 ** (failures - 1))
    sha256 = sha256 or told
    got_size, got = part.stat().st_size, file_sha256(part)
    if got_size != size or (sha256 and got != sha256):
        part.unlink()
        expected = f"{size} bytes" + (f" of SHA-256 {sha256}" if sha256 else "")
        raise UserError(
            f"{url}: truncated or altered: {got_size} bytes of SHA-256 {got} came, not {expected}; try again"
        )
    part.replace(path)


def _fetch(url, part, had):
    """Add what is missing to the `had` bytes of a part; returns the size of the whole and the hub's SHA-256 or None."""
    etag_file = part.with_name(
        part.name + ".etag"
    )  # so that parts of two versions of a file are never joined
    etag = etag_file.read_text() if had and etag_file.exists() else None
    headers = {"Accept-Encoding": "identity"}
    if had:
        headers |= {"Range": f"bytes={had}-"} | ({"If-Range": etag} if etag else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 429 or response.status_code >= 500:
            raise requests.HTTPError(response=response)
        tags = [
            r.headers.get("X-Linked-ETag", "").strip('"') for r in (*response.history, response)
        ]
        sha256 = next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), None)
        fits = etag in (None, response.headers.get("ETag", etag))
        if (
            response.status_code == 416
            and fits
            and response.headers.get("Content-Range") == f"bytes */{had}"
        ):
            etag_file.unlink(missing_ok=True)
            return had, sha256  # the part has all bytes already
        if response.status_code == 416 or (response.status_code == 206 and not fits):
            part.unlink()
            raise requests.ConnectionError("the part is not of this file")
        if not response.ok:
            raise UserError(f"{url}: the server answers {response.status_code} {response.reason}")
        had = had if response.status_code == 206 else 0
        length = response.headers.get("Content-Length")
        size = had + int(length) if length else None
        part.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to keep
        if "ETag" in response.headers:
            etag_file.write_text(response.headers["ETag"])
        bar = tqdm(total=size, initial=had, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with open(part, "ab" if had else "wb") as file, bar:
            for chunk in response.iter_content(BLOCK):
                file.write(chunk)
                bar.update(len(chunk))
    etag_file.unlink(missing_ok=True)
    return size or part.stat().st_size, sha256
