"""GPT-2 124M with rotary positions; all else as in gpt2.py."""

from config.gpt2 import *

model = "model_rope"
