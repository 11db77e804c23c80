"""Shakespeare by characters with all three attention changes; all else as in
shakespeare_char.py."""

from config.shakespeare_char import *

model = "model_rope_gqa_swa"
n_kv_head = 2  # for 4 query heads
window = 16  # of 64 tokens
