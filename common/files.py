"""Files that are either complete or not there, also after a crash."""

import json
import os
from pathlib import Path


def write_json(path, value):
    """Replace a JSON file in one step: a reader sees the old or the new file, never a part."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def fsync_directory(path):
    """Flush a directory's entries to disk, so that a rename in it survives a power failure."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
