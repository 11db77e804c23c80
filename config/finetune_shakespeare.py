"""Finetune GPT-2 124M on Shakespeare.

It trains past the lowest validation loss on purpose; the best checkpoint is kept.
"""

dataset = "shakespeare"
init_from = "gpt2"
dropout = 0.1

batch_size = 1
total_batch_size = 32 * 1024  # 32 sequences of 1024; an epoch is 304,222 tokens, 9 steps
max_steps = 40
learning_rate = 3e-5
min_lr = 3e-6
warmup_steps = 2

eval_interval = 5
log_interval = 1
