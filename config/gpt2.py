"""GPT-2 124M on 10 billion tokens of FineWeb: python prepare_data.py fineweb --shards=103 (20 GB).

It takes 9.2 GB of GPU memory, and 17.7 GB with --compile=False, measured with torch's allocator on
a stand-in for an H200 (docs/BENCHMARKS.md). Add config/small_gpu.py for less, and
config/large_gpu.py on GPUs of 80 GB and more.
"""

dataset = "fineweb"
# 50257, padded to a multiple of 128, which is faster on GPUs. Sampling never chooses the padding,
# and exports leave it out.
vocab_size = 50304

batch_size = 16
total_batch_size = 16 * 1024 * 32  # sequences x tokens x micro-steps = 524,288 tokens
max_steps = 10_000_000_000 // total_batch_size  # 19,073
learning_rate = 6e-4  # GPT-3 small's (Brown et al. 2020, table 2.1)
min_lr = 6e-5
warmup_steps = 700  # 367 million tokens; GPT-3 had 375
weight_decay = 0.1

eval_interval = 250
eval_tokens = 20 * 524_288  # 10 million
checkpoint_interval = 1000
