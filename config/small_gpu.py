"""A layer over the other configs for GPUs of 8 to 16 GB: python train.py config/gpt2.py config/small_gpu.py

The same total_batch_size, so the same result, in smaller bites and with activations recomputed.
"""

batch_size = 4
activation_checkpointing = True
