"""Add to another config, for GPUs with little memory.

    python train.py config/gpt2.py config/small_gpu.py

total_batch_size stays, so the result is the same up to rounding: there are more and smaller
micro-steps, and activations are recomputed. gpt2.py then takes 2.5 GB and gpt2_medium.py 6.3 GB
(measured as in gpt2.py). Weights, gradients and AdamW state of gpt2_large and gpt2_xl alone take 12
and 25 GB.
"""

batch_size = 2
activation_checkpointing = True
