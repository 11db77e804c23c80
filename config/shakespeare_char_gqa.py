"""Shakespeare by characters with grouped-query attention; all else as in shakespeare_char.py."""

from config.shakespeare_char import *

model = "model_gqa"
n_kv_head = 2  # for 4 query heads
