"""GPT-2 large (774,030,080 parameters) on FineWeb; gpt2.py explains the numbers."""

dataset = "fineweb"
vocab_size = 50304
n_layer = 36
n_head = 20
n_embd = 1280

batch_size = 4
total_batch_size = 4 * 1024 * 128
max_steps = 10_000_000_000 // total_batch_size
learning_rate = 2.5e-4  # GPT-3 Large's, of 760 million parameters (Brown et al. 2020, table 2.1)
min_lr = learning_rate / 10
warmup_steps = 700

eval_interval = 250
eval_tokens = 20 * 524_288
checkpoint_interval = 1000
