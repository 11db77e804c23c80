"""GPT-2 124M with rotary positions on 5.0 billion tokens of FineWeb: a run with a published curve.

    python prepare_data.py fineweb --shards=50                             # 5 billion tokens, 10 GB
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_rope_5b.py

The curve is AdamW's in https://github.com/KellerJordan/modded-nanogpt, the one log in
records/track_1_short/2024-06-06_AdamW. Validation loss, on the same 10,485,760 tokens as here:

    step    128    256    512   1024   2048   4096   7552   8064   8576   9088   9536
    loss  6.034  5.231  4.329  3.905  3.684  3.523  3.437  3.395  3.349  3.307  3.276

From step 7552 on the learning rate falls, and the loss falls faster. The README beside the log
gives its learning rate, betas, warmup and decay ("IIRC"). The log comes without code: weight decay
and the differences below are those of train_gpt2.py and run.sh of June 14, 2024 (490a01ff), which
has 256 steps of warmup and 2,048 of decay, and whose README quotes a loss of 3.2818.

Differences that remain, there / here:
    norms         RMSNorm without gain / LayerNorm with gain
    GELU          exact / tanh form
    weights       uniform, std 0.021 (MLP's c_proj 0.010), and attention's output is scaled by
                  1 / sqrt(24) in every pass / normal, std 0.02 (both c_proj 0.0041), no scale
    gradients     as they are; before June 14 normalized per parameter / clipped at norm 1
    decay         the last 2,000 steps / the last fifth, 1,907 steps
    order         shards in order, cut into sequences / shuffled sequences of the same shards
"""

from config.gpt2 import *

model = "model_rope"
bias = False
max_steps = 9_536  # x 524,288 tokens = 5.0 billion
learning_rate = 1.8e-3
min_lr = 0.0
warmup_steps = 250
lr_schedule = "wsd"
eval_interval = 128  # as in the log
