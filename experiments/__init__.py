"""What does each variant cost, and what does it bring? One question per file.

python -m experiments.NAME --preset=cpu
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py
