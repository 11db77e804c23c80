"""A layer for GPUs of 8 to 16 GB: python train.py config/gpt2.py config/small_gpu.py

The same total_batch_size, so the same result up to rounding, in smaller bites and with activations recomputed. It
serves gpt2.py and gpt2_medium.py (16 GB); the weights, gradients and AdamW state of gpt2_large and gpt2_xl alone take
12 and 25 GB.
"""

batch_size = 2
activation_checkpointing = True
