"""The attribute names by which models call their parts, compared whole and never by substring.

Within a module of known type they tell one matrix from another; without a module they are the last resort.
"""

from collections.abc import Sequence


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


QUERY = _words(
    """q_proj query q wq Wq to_q to_query q_lin query_proj linear_q project_q projection_query q_head q_attn q_b_proj
    wq_b query_global"""
)
KEY = _words("k_proj key k wk Wk to_k to_key k_lin key_proj linear_k project_k projection_key k_head key_global")
VALUE = _words(
    "v_proj value v wv Wv to_v to_value v_lin value_proj linear_v project_v projection_value v_head value_global"
)
OUTPUT = _words("o_proj out_proj o wo Wo to_out out_lin output_proj post_proj linear_out c_proj dense proj out")
FUSED = _words("c_attn query_key_value qkv_proj qkv Wqkv wqkv attn_qkv qkv_linear att_proj W_pack in_proj_weight")
LATENT_KEY_VALUE = "kv_b_proj"
"""Multi-head latent attention: per head, the key's part without rotary positions, then the value."""
KEY_VALUE = _words("c_attn kv_proj to_kv") | {LATENT_KEY_VALUE}

MLP = _words(
    """gate_proj up_proj down_proj gate_up_proj fc1 fc2 c_fc wi wi_0 wi_1 dense_h_to_4h dense_4h_to_h
    w1 w2 w3 lin1 lin2"""
)
ROUTER = _words("router gate wg shared_expert_gate")
HEAD = _words("lm_head embed_out classifier score qa_outputs head")
"""Of the whole model: output layers that it does not list as its output embeddings."""

TOKENS = _words("embed_tokens wte wpe word_embeddings position_embeddings token_type_embeddings embed_in shared")
"""Modules that embed."""
VECTORS = _words(
    """cls_token class_token class_embedding mask_token mask_tokens masked_spec_embed distillation_token dist_token
    register_tokens position_embedding position_embeddings positional_embedding pos_embed pos_embedding
    pos_embed_window rel_pos_h rel_pos_w query_tokens latents probe level_embed image_newline"""
)
"""Parameters without a module of their own that hold one vector per token or position."""
GAINS = _words("lambda1 lambda_1 lambda_2 gamma gamma_1 gamma_2 layer_scale layer_scale_1 layer_scale_2")
"""Parameters without a module of their own that scale a vector, as a norm's weight does."""

ADAPTER = _words("lora_A lora_B lora_E lora_embedding_A lora_embedding_B lora_magnitude_vector trainable_tokens_delta")
"""Attributes of PEFT's layers (LoRA, DoRA, AdaLoRA, trainable tokens) that hold one weight per adapter."""


def adapter_part(path: Sequence[str]) -> str | None:
    """The attribute of PEFT's on the way to a parameter, if there is one."""
    return next((attribute for attribute in reversed(path) if attribute in ADAPTER), None)


def is_bias(leaf: str) -> bool:
    """Whether a parameter's attribute name has the word "bias": bias, gate_up_proj_bias, bias_ih_l0, dt_bias."""
    return "bias" in leaf.split("_")
