"""A small GPT-2 on the source code of Python's standard library, by bytes.

It takes about a minute on two CPU cores.
"""

dataset = "stdlib"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128

batch_size = 8
total_batch_size = batch_size * block_size  # many small steps lower the loss most in a minute
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
