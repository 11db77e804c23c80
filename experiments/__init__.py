"""What each change costs and buys: one question per file, python -m experiments.NAME --preset=cpu."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py
