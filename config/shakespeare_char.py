"""Shakespeare by characters, at the size of nanoGPT's CPU example: some minutes on two cores."""

dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
total_batch_size = batch_size * block_size
max_steps = 2000
learning_rate = 4e-3  # small models learn at high rates
min_lr = 1e-4
warmup_steps = 100
beta2 = 0.99  # few tokens a step: a longer memory of the gradient's square

eval_interval = 500
log_interval = 100
