"""Families that have no module of ours and run through Transformers' code; fields that are ``...`` are left out of config.json."""

from __future__ import annotations

from typing import Any

FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    # multipliers before the first layer, at each residual, of attention scores and after the head
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": 16}),  # fused q, k and v, fused gate and up
    "gemma": ("gemma", {"pad_token_id": 0, "head_dim": 24, "num_key_value_heads": 4}),  # a scaled, tied embedding
    "gemma3": (  # layers with a window and without, each with its own rotary frequencies
        "gemma3_text",
        {"pad_token_id": 0, "head_dim": 24, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "olmo2": ("olmo2", {"pad_token_id": 0}),  # norms over all heads of q and of k
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": ...}),  # q, k and v of each head side by side; a head renamed in the checkpoint
    "starcoder2": ("starcoder2", {"sliding_window": 16}),  # biases, layer norms, a plain MLP
    "phi": ("phi", {}),  # attention beside the MLP, a head with a bias, part of each head rotated
    "cohere": ("cohere", {"pad_token_id": 0}),  # scaled logits, pairs rotated, tied
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"pad_token_id": 0, "head_dim": 24}),  # caps attention scores
    "nemotron": ("nemotron", {}),  # does not hand keywords on to attention
    "granite-moe": ("granitemoe", {}),  # experts
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}),  # no plan
}
