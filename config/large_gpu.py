"""Add to another config, for GPUs of 80 GB and more.

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py config/large_gpu.py

total_batch_size stays, so the result is the same up to rounding: there are fewer and larger
micro-steps. On 8 GPUs, gpt2.py and its variants then take one micro-step per optimizer step instead
of four. gpt2.py takes 30 GB, and 64 GB with --compile=False (measured as in gpt2.py).
"""

batch_size = 64
