"""GPT-2 124M with sliding-window attention; all else as in gpt2.py."""

from config.gpt2 import *

model = "model_swa"
window = 256  # of 1024 tokens
