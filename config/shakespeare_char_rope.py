"""Shakespeare by characters with rotary positions; all else as in shakespeare_char.py."""

from config.shakespeare_char import *

model = "model_rope"
