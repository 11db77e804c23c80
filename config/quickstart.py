"""A small GPT-2 on the source code of Python's standard library, by bytes.

It takes about a minute on two CPU cores.
"""

import os

dataset = "stdlib"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128

total_batch_size = 8 * block_size  # many small steps lower the loss most in a minute
batch_size = 8 // int(os.environ.get("WORLD_SIZE", 1))  # per process; torchrun sets WORLD_SIZE
max_steps = 1600
optimizer = "muon"
muon_learning_rate = 0.01  # of the matrices in the blocks; docs/RECIPES.md has the sweep
learning_rate = 8e-3  # of embeddings and vectors; small models learn at high rates
min_lr = 1e-5
lr_schedule = "wsd"
warmup_steps = 50
beta2 = 0.99  # few tokens a step: a longer memory of the gradient's square

eval_interval = 400
eval_tokens = 32 * 1024
log_interval = 100
