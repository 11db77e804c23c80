"""Shakespeare by characters with sliding-window attention; all else as in shakespeare_char.py."""

from config.shakespeare_char import *

model = "model_swa"
window = 16  # of 64 tokens
