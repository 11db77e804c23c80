"""A small GPT-2 on the source text of Python's standard library, byte by byte: about a minute on two CPU cores."""

dataset = "stdlib"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128

batch_size = 16
total_batch_size = batch_size * block_size
max_steps = 900
learning_rate = 4e-3  # small models learn at high rates
min_lr = 4e-4
warmup_steps = 50
beta2 = 0.99

eval_interval = 300
eval_tokens = 32 * 1024
log_interval = 50
