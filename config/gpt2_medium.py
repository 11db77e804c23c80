"""GPT-2 medium (354,823,168 parameters) on FineWeb; gpt2.py explains the numbers."""

dataset = "fineweb"
vocab_size = 50304
n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 8
total_batch_size = 8 * 1024 * 64
max_steps = 10_000_000_000 // total_batch_size
learning_rate = 3e-4  # GPT-3 Medium's, of 350 million parameters (Brown et al. 2020, table 2.1)
min_lr = learning_rate / 10
warmup_steps = 700

eval_interval = 250
eval_tokens = 20 * 524_288
checkpoint_interval = 1000
