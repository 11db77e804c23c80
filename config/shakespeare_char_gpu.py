"""Shakespeare by characters, at the size of nanoGPT's GPU example, the "baby GPT".

nanoGPT's README reports three minutes on an A100 and a best validation loss of 1.4697. The model
overfits: the best checkpoint, which sampling takes, is not the last one.
"""

dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
bias = False  # nanoGPT's default

batch_size = 64
total_batch_size = batch_size * block_size
max_steps = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 100
beta2 = 0.99  # few tokens a step: a longer memory of the gradient's square

eval_interval = 250  # often, because the model overfits
