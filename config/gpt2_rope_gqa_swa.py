"""GPT-2 124M with all three changes of attention; all else as in gpt2.py."""

from config.gpt2 import *

model = "model_rope_gqa_swa"
n_kv_head = 4  # for 12 query heads
window = 256  # of 1024 tokens
