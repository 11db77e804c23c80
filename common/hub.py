"""Files of the Hugging Face hub, by huggingface_hub: its cache, its mirrors, its offline mode.

    download("openai-community/gpt2", "model.safetensors")

HF_HOME or HF_HUB_CACHE say where the cache is, HF_ENDPOINT names a mirror, and HF_HUB_OFFLINE
forbids all requests, as huggingface_hub documents them. A file appears under its final name only
when it has the size that the server announced.

The functions import huggingface_hub, because that takes long and few commands need it.
"""

import contextlib
from pathlib import Path

from common.errors import UserError
from common.files import name_in_errors


def cached_file(repository, name):
    """Return the path of a model repository's file in the cache, None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, name)
    except HFValidationError:  # no repository can have this name
        return None
    return Path(path) if isinstance(path, str) else None


def download(repository, name, repo_type="model", local_dir=None):
    """Download a file of a repository, unless it is there already; return its path.

    local_dir   the directory to download to; None: the cache

    Raises UserError if the file is not available or not complete, and OSError for a full disk.
    """
    from huggingface_hub import constants, hf_hub_download

    try:
        with _without_warnings(), name_in_errors(local_dir or constants.HF_HUB_CACHE):
            path = hf_hub_download(repository, name, repo_type=repo_type, local_dir=local_dir)
    except Exception as error:  # also those of its HTTP clients, which differ between versions
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise UserError(_explain(repository, name, error)) from error
    return Path(path)


@contextlib.contextmanager
def _without_warnings():
    """Let huggingface_hub log errors only: it warns of each attempt, and the last one raises."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _explain(repository, name, error):
    """Say in one line why a download failed, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why the hub could not be asked
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{name} of {repository} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
            "forbids the download: unset HF_HUB_OFFLINE, or set HF_HOME to the right cache"
        )
    response = getattr(error, "response", None)
    if response is not None:
        reason = f"status {response.status_code}"
    else:
        first_line = str(error).partition("\n")[0]
        reason = f"{type(error).__name__}: {first_line}"
    return (
        f"{name} of {repository} cannot be downloaded from {constants.ENDPOINT} ({reason}): try "
        "again, set HF_ENDPOINT to a mirror, or set HF_HOME to a cache that has the file"
    )
