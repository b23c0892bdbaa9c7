"""The models that the papers report on, as shapes written by hand: nothing is downloaded and no file is looked for.

`configs/models/` has the same models as files; a test holds the two together.
"""

from __future__ import annotations

from typing import Any


def _llama(
    hidden: int, layers: int, mlp: int, heads: int, *, kv_heads: int | None = None, vocabulary: int = 32000
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": False,
    }


PAPER_MODELS: dict[str, dict[str, Any]] = {
    "llama_60m": _llama(512, 8, 1376, 8),
    "llama_130m": _llama(768, 12, 2048, 12),
    "llama_350m": _llama(1024, 24, 2736, 16),
    "llama_1.3b": _llama(2048, 24, 5461, 32),
    "tinyllama_1.1b": _llama(2048, 22, 5632, 32, kv_heads=4),
    "llama2_7b": _llama(4096, 32, 11008, 32),
    "llama2_13b": _llama(5120, 40, 13824, 40),
    "llama3_8b": _llama(4096, 32, 14336, 32, kv_heads=8, vocabulary=128256),
    "gpt2_xl": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "tie_word_embeddings": True,
    },
}
"""By the name of the file in `configs/models/`: what a transformers config needs beside its defaults."""
