"""TinyStories on one GPU: a GPT of 30M parameters for coherent sentences.

    python prepare_data.py tinystories         # 2.2 GB of text, about 500 million tokens
    python train.py config/tinystories.py
    python sample.py --init_from=out/tinystories --prompt="Once upon a time"

The stories use words that small children know. Eldan and Li (2023), who made them, report fluent
stories by models of this size. config/tinystories_cpu.py is smaller.
"""

dataset = "tinystories"

n_layer = 6
n_head = 6
n_embd = 384  # 10.6M parameters in the blocks, 19.3M in the embedding of 50,257 tokens
block_size = 512  # longer than most stories

batch_size = 32
total_batch_size = 128 * block_size
max_steps = 15_000  # x 65,536 tokens = 1 billion, two epochs
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 500

eval_interval = 500
eval_tokens = 2**20
