"""GPT-2 xl (1,557,611,200 parameters) on FineWeb; gpt2.py explains the numbers."""

dataset = "fineweb"
vocab_size = 50304
n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 2
total_batch_size = 2 * 1024 * 256
max_steps = 10_000_000_000 // total_batch_size
learning_rate = 2e-4  # GPT-3 XL's, of 1.3 billion parameters (Brown et al. 2020, table 2.1)
min_lr = learning_rate / 10
warmup_steps = 700

eval_interval = 250
eval_tokens = 20 * 524_288
checkpoint_interval = 1000
activation_checkpointing = True
