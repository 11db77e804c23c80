"""Evaluate the released GPT-2: its validation loss on FineWeb.

python train.py config/eval_gpt2.py --init_from=gpt2-xl
python train.py config/eval_gpt2.py --dataset=shakespeare    1 MB of text instead
"""

dataset = "fineweb"
init_from = "gpt2"
eval_only = True

batch_size = 8
eval_tokens = 20 * 524_288  # 10 million
