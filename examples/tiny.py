"""What the examples train: a Llama of 35,000 parameters on the bytes of Python's language reference. No download."""

from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,  # one token per byte
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def windows(count: int = 512, length: int = 64) -> list[dict[str, Tensor]]:
    """The first ``count`` pieces of the text, ``length`` tokens each; a causal LM shifts its labels by itself."""
    text = "".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.tensor(list(text[: count * length])).view(count, length)
    return [{"input_ids": row, "labels": row} for row in tokens]
