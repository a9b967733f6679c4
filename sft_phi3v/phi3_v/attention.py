"""Rows that lie behind each other in one sequence attend each to itself.

    ids   <s> a b c <s> d e <s> f g h       cu_seq_lens_q 0 4 7 11: what starts each row, and the end
    attention  ▄▟█  ▄▟█   ▄▟█                three small triangles, where a mask would compute the whole square

On CUDA, `attn_implementation: flash_attention_2` reads `cu_seq_lens_q` itself. `sdpa` does not: it would get a mask of
(length × length) and compute what the mask then hides. This one cuts the rows apart and calls `sdpa` for each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA_BY_ROW = "sdpa_by_row"


def sdpa_by_row(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    As transformers' `sdpa`, of which it is one call per row where `row_lengths` are given, without a mask.

    Args:
        query (`torch.Tensor` of shape `(1, heads, length, head_dim)`): Queries of all rows; keys and values alike.
        row_lengths (sequence of `int`, *optional*): Tokens of each row. Without it the call is `sdpa`'s own.

    Returns:
        `tuple[torch.Tensor, None]`: Outputs, `(1, length, heads, head_dim)`, and no weights.

    Raises:
        ValueError: If a row is longer than the model's `sliding_window`, which only a mask could say to `sdpa`.
    """
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if sliding_window is not None and max(row_lengths) > sliding_window:
        raise ValueError(
            f"A row has {max(row_lengths)} tokens, more than this model's sliding_window {sliding_window}."
        )
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows]
    return torch.cat(outputs, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(SDPA_BY_ROW, sdpa_by_row)
ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA_BY_ROW, sdpa_mask)
