"""Add to another config, for GPUs of 8 to 16 GB.

    python train.py config/gpt2.py config/small_gpu.py

total_batch_size stays, so the result is the same up to rounding: there are more and smaller
micro-steps, and activations are recomputed. It serves gpt2.py and gpt2_medium.py (16 GB). Weights,
gradients and AdamW state of gpt2_large and gpt2_xl alone take 12 and 25 GB.
"""

batch_size = 2
activation_checkpointing = True
