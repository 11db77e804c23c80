"""The idea of the exercise gqa: groups of query heads share a KV head."""

import pytest
import torch
from exercises import missing, version_fixture

gqa = version_fixture("gqa")
CASES = {"training": (5, 5), "decode": (1, 5), "a chunk after cached tokens": (2, 5)}  # T, S


@pytest.mark.parametrize("case", CASES)
def test_each_query_head_uses_the_kv_head_of_its_group(gqa, case):
    T, S = CASES[case]
    H, G = 6, 2
    attention = gqa.CausalSelfAttention(gqa.GPTConfig(n_head=H, n_embd=4 * H, n_kv_head=G), layer=0)
    q, k = torch.zeros(1, H, T, 4), torch.zeros(1, G, S, 4)
    v = torch.arange(G).view(1, G, 1, 1).expand(1, G, S, 4).float()  # the number of the KV head
    used = attention.attend(q, k, v)[0, :, 0, 0]
    for head in range(H):
        group = head // (H // G)
        if used[head] != group:
            first = group * (H // G)
            missing(
                f"{case}: query head {head} uses KV head {used[head]:g}, but must use KV head "
                f"{group}: query heads {first} to {first + H // G - 1} share it"
            )
