"""GPT-2 124M with grouped-query attention; all else as in gpt2.py."""

from config.gpt2 import *

model = "model_gqa"
n_kv_head = 4  # for 12 query heads
