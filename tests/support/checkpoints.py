"""Tiny random checkpoints, one per model family, written by Transformers.

Norm weights and biases are random too: at their initial ones and zeros a model that lacks them would pass every comparison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from support.foreign_families import FOREIGN, REFUSED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.7,  # checkpoints have equal ones, which leaves cos and sin as they are
    "mscale_all_dim": 1.0,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rope_parameters": YARN,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 44,
    "first_k_dense_replace": 1,
}
SIZES: dict[str, Any] = {
    "vocab_size": 509,  # odd, so that every tensor-parallel size pads it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # fewer than the ranks at tp 4
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 257,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}),
    "tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "mixtral": ("mixtral", {"num_local_experts": 7, "num_experts_per_tok": 2, "sliding_window": 16}),
    "qwen2-moe": (
        "qwen2_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 44,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "head_dim": 24,
        },
    ),
    "dots1": (
        "dots1",
        {
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 44,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
        },
    ),
    "glm4-moe": (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 44,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "head_dim": 24,
            "num_nextn_predict_layers": 0,
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": 28,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "n_shared_experts": 2,
            "routed_scaling_factor": 3.0,
            "rms_norm_eps": 1e-3,  # not that of the norms within the attention
        },
    ),
    "deepseek-v2-lite": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    "deepseek-v3": ("deepseek_v3", {**LATENT, "q_lora_rank": 28, "n_group": 4, "topk_group": 2, "attention_bias": True}),
    "deepseek-v3-halves": (
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "kv_lora_rank": 8,  # so small that nothing is ever expanded
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "rope_parameters": None,
        },
    ),
}


def save_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    stacks_experts: bool = False,
    **overrides: Any,
) -> Any:
    """Write config.json and safetensors of a random model and return the Transformers model in eval mode.

    Args:
        directory: made if it is not there.
        family: a key of ``FAMILIES``, ``FOREIGN`` or ``REFUSED``.
        seed: equal seeds give equal weights.
        dtype: of the stored weights and of the returned model.
        max_shard_size: below the model's size (about 500 KB in float32) the weights are split and an index is written.
        stacks_experts: write the experts of a layer as one tensor, as Transformers has them in memory, instead of one by one.
        overrides: fields of config.json.
    """
    model_type, fields = {**FAMILIES, **FOREIGN, **REFUSED}[family]
    config = transformers.AutoConfig.for_model(model_type, **{k: v for k, v in {**SIZES, **fields, **overrides}.items() if v is not ...})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.5)
    model.to(dtype).requires_grad_(False)
    model.config.dtype = dtype
    model.save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=not stacks_experts)
    return model


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single bytes (ids 0 to 255), with <s> 256, </s> 257 and a chat template, beside a checkpoint."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    fast.save_pretrained(directory)
