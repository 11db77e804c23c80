"""TinyStories on a CPU: a model of 1.3M parameters, by bytes, in about an hour on two cores.

    python prepare_data.py tinystories_byte    # 2.2 GB of text, of which an hour reads 31 MB
    python train.py config/tinystories_cpu.py
    python sample.py --init_from=out/tinystories_cpu --prompt="Once upon a time"

By bytes, because with GPT-2's 50,257 tokens most of the time would go into the logits, and most of
the parameters into embeddings that an hour does not train.
"""

dataset = "tinystories_byte"

n_layer = 6
n_head = 4
n_embd = 128
block_size = 384

batch_size = 8
total_batch_size = batch_size * block_size
max_steps = 10_000
optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 8e-3
min_lr = 1e-5
lr_schedule = "wsd"
warmup_steps = 100
beta2 = 0.99  # few tokens a step: a longer memory of the gradient's square

eval_interval = 1000
eval_tokens = 64 * block_size
log_interval = 100
