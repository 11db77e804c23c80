"""The validation loss of the released GPT-2: python train.py config/eval_gpt2.py --init_from=gpt2-xl for another size.

--dataset=shakespeare evaluates it on 1 MB of text instead of FineWeb.
"""

dataset = "fineweb"
init_from = "gpt2"
eval_only = True

batch_size = 8
eval_tokens = 20 * 524_288  # 10 million
