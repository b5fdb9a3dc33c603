"""Small models of random weights for every causal language model that transformers knows."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model type -> class of its causal LM."""

# fmt: off
SIZES: list[tuple[Any, str]] = [
    (97, "vocab_size text_vocab_size vocab_size_per_layer_input"),
    (128, "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len max_target_positions"),
    (
        48,
        """intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_inner ff_dim
        dff intermediate_dim moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size block_ff_dim dense_intermediate_size
        intermediate_size_mlp expert_intermediate_size""",
    ),
    (
        32,
        """hidden_size d_model n_embd dim embed_dim word_embed_proj_dim model_dim emb_dim embedding_size
        attention_hidden_size lru_width input_embedding_size dim_model n_embed hidden_dim mamba_d_inner""",
    ),
    (16, "q_lora_rank kv_lora_rank rank index_head_dim hidden_size_per_layer_input mamba_dt_rank time_step_rank"),
    (
        8,
        """head_dim d_kv qk_nope_head_dim qk_rope_head_dim kv_channels state_size mamba_d_state ssm_state_size
        attention_head_dim mamba_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim rotary_dim dim_head
        global_head_dim swa_head_dim qk_head_dim mlstm_head_dim laurel_rank""",
    ),
    (12, "v_head_dim"),
    (
        4,
        """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts sliding_window sliding_window_size attention_chunk_size
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers linear_num_value_heads
        mamba_num_heads mamba_n_heads chunk_size window_size max_window_layers""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok moe_k moe_topk top_k linear_num_key_heads
        mamba_expand num_global_key_value_heads moe_top_k index_n_heads""",
    ),
    (
        1,
        """n_group topk_group n_groups mamba_n_groups mamba_ngroups n_shared_experts moe_num_shared_experts
        first_k_dense_replace num_shared_experts num_zero_experts pad_token_id num_dense_layers""",
    ),
    (True, "use_sliding_window is_decoder"),
    (False, "add_cross_attention use_cache"),
    (
        0.0,
        """attention_dropout hidden_dropout embedding_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout_prob
        dropout attention_probs_dropout_prob activation_dropout dropout_rate attn_dropout residual_dropout ffn_dropout
        embd_dropout resid_dropout layerdrop decoder_layerdrop router_jitter_noise input_jitter_noise 
        classifier_dropout summary_first_dropout summary_last_dropout""",
    ),
]
# fmt: on
VALUES = {name: value for value, names in SIZES for name in names.split()}


SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8),
    "dots3_note_text": dict(num_key_value_heads=4),
    "gemma3n_text": dict(num_kv_shared_layers=0, num_hidden_layers=4),
    "gemma4_assistant": dict(hidden_size_per_layer_input=0),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], num_layers=4),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "longcat_flash": dict(qk_head_dim=16, head_dim=8),
    "mamba2": dict(num_heads=8, head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "reformer": dict(axial_pos_embds_dim=[8, 24], axial_pos_shape=[8, 16]),
    "cohere_compass_text": dict(layer_types=["sliding_attention", "full_attention"] * 2),
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}
"""What the general sizes get wrong: options by model type."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of a few thousand weights, with every type of layer that the default one has."""
    return shrink(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))


def shrink(kind: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of this class with the sizes of `SIZES`, its parts included."""
    default = kind()
    given: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name in more:
            continue
        if isinstance(value, PreTrainedConfig):
            given[name] = shrink(type(value), SPECIAL.get(value.model_type, {})).to_dict()
        elif name in VALUES:
            given[name] = type(value)(VALUES[name]) if type(value) in (int, float, bool) else VALUES[name]
    for plain, own in getattr(default, "attribute_map", {}).items():
        if plain in VALUES and hasattr(default, own):
            given[own] = VALUES[plain]
    if "kv_lora_rank" in given and "num_key_value_heads" in given:  # latent attention has as many keys as queries
        given["num_key_value_heads"] = given.get("num_attention_heads", 4)
    if isinstance(types := vars(default).get("layer_types"), list):
        given["layer_types"] = (list(dict.fromkeys(types)) * 4)[:4]
    return kind(**(given | more))
