"""The blocks of code in docs/, which tests run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)  # (language, code)
PAGES = ("README.md", "docs/RECIPES.md", "docs/EXPORTS.md", "docs/YOUR_OWN_VARIANT.md")


def block(language, part):
    """Return the one block of code of PAGES in this language that contains `part`."""
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    blocks = [block for text in texts for block in BLOCK.findall(text)]
    [code] = [code for name, code in blocks if name == language and part in code]
    return code
