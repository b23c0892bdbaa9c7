"""Attention heads: how many output rows one head has, and how a fused query-key-value weight is laid out.

The attention module's own attributes come first, the config of the nearest module that has one second. A layout that
cannot be read off is answered with None, never guessed.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ds_optim.roles.attribute_names import FUSED, KEY, KEY_VALUE, LATENT_KEY_VALUE, QUERY
from ds_optim.roles.role import Part, Source

# An integer attribute that holds what is asked for, in order of preference.
_HEAD_DIM = (
    "qk_head_dim",
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_size",
    "d_kv",
    "dim_head",
    "d_head",
    "kv_channels",
)
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTH = ("hidden_size", "embed_dim", "n_embd", "d_model", "dim")

# Classes of transformers that keep query, key and value of one head together.
_HEAD_BY_HEAD = (
    "GPTNeoXAttention",
    "GPTNeoXJapaneseAttention",
    "BloomAttention",
    "PersimmonAttention",
    "MiniMaxLightningAttention",
)
# An attribute that such classes use, and others (ChatGLM's) for three plain thirds: it says nothing without the class.
_AMBIGUOUS = "query_key_value"


def is_attention(module: nn.Module) -> bool:
    """Whether the module holds projections to queries and keys, apart or fused, under one of the known names.

    A layer that takes its keys from another one has queries only; then its class must say that it is an attention.
    """
    names = children(module)
    has_keys = bool(names & (KEY | KEY_VALUE)) or "Attention" in type(module).__name__
    return bool(names & FUSED) or bool(names & QUERY and has_keys)


def children(module: nn.Module) -> set[str]:
    """Attribute names of a module's own parameters and submodules."""
    return {*module._modules, *module._parameters}


def head_dim_of(ancestors: Sequence[nn.Module], rows: int, query_rows: int | None) -> tuple[int, Source] | None:
    """Output rows per head, or None if neither the module nor a config tells.

    Args:
        ancestors: the attention module first, then the modules around it, ending with the model.
        rows: output rows of the weight in question; the answer divides them.
        query_rows: output rows of the query's weight, where it is a weight of its own. With grouped queries a key has
            fewer rows, but the same head dimension.
    """
    sources: tuple[tuple[Any, Source], ...] = ((ancestors[0], "module"), (_config(ancestors), "config"))
    for holder, source in sources:
        heads = _integer(holder, _HEADS)
        width = _integer(holder, _WIDTH)
        candidates = [_integer(holder, [name]) for name in _HEAD_DIM]
        if heads:
            candidates += [size // heads for size in (query_rows, width) if size and size % heads == 0]
        for candidate in candidates:
            if candidate and rows % candidate == 0 and (query_rows or 0) % candidate == 0:
                return candidate, source
    return None


def value_head_dim_of(ancestors: Sequence[nn.Module], rows: int, query_rows: int | None) -> int | None:
    """Output rows per head of a value, which may be wider or narrower than a query's; see `head_dim_of`."""
    for holder in (ancestors[0], _config(ancestors)):
        stated = _integer(holder, ["v_head_dim"])
        if stated and rows % stated == 0:
            return stated
    found = head_dim_of(ancestors, rows, query_rows)
    return found[0] if found else None


def fused_parts(ancestors: Sequence[nn.Module], name: str, rows: int) -> tuple[tuple[Part, ...], int, Source] | None:
    """The parts of a fused attention weight in order along its output dimension, the head dimension, and the evidence.

    Args:
        ancestors: as in ``head_dim_of``.
        name: the weight's attribute in the attention module, for instance "qkv_proj".
        rows: its output rows.
    """
    attention = ancestors[0]
    class_name = type(attention).__name__
    if name == LATENT_KEY_VALUE:
        return _latent_parts(attention, rows)
    found = head_dim_of(ancestors, rows, None)
    if found is None or name in KEY_VALUE - FUSED:
        return None
    dim, source = found
    config = _config(ancestors)
    heads = _integer(attention, _HEADS) or _integer(config, _HEADS) or rows // (3 * dim)
    key_heads = _integer(attention, _KEY_VALUE_HEADS) or _integer(config, _KEY_VALUE_HEADS) or heads
    if "q_attn" in children(attention):  # cross-attention of the GPT-2 family: c_attn holds keys and values only
        parts = _plain(0, rows // (2 * dim), dim)
    elif class_name in _HEAD_BY_HEAD:
        parts = _plain(1, 1, dim) * heads
    elif class_name in _BY_CLASS:
        parts = _BY_CLASS[class_name](attention, heads, key_heads, dim)
    elif name == _AMBIGUOUS:
        return None
    else:  # a tower may have no grouped queries where the config that was found has
        parts = _plain(heads, key_heads if (heads + 2 * key_heads) * dim == rows else heads, dim)
    return (parts, dim, source) if sum(part.size for part in parts) == rows else None


def _plain(heads: int, key_heads: int, dim: int) -> tuple[Part, ...]:
    """Queries, then keys, then values."""
    sizes = (("query", heads * dim), ("key", key_heads * dim), ("value", key_heads * dim))
    return tuple(Part(kind, size) for kind, size in sizes if size)  # type: ignore[arg-type]


def _latent_parts(attention: nn.Module, rows: int) -> tuple[tuple[Part, ...], int, Source] | None:
    key, value = _integer(attention, ["qk_nope_head_dim"]), _integer(attention, ["v_head_dim"])
    if not key or not value or rows % (key + value):
        return None
    return (Part("key", key), Part("value", value)) * (rows // (key + value)), key, "module"


def _falcon(attention: nn.Module, heads: int, key_heads: int, dim: int) -> tuple[Part, ...]:
    if getattr(attention, "new_decoder_architecture", False):  # the queries of a group, then their key and value
        return _plain(heads // key_heads, 1, dim) * key_heads
    if getattr(attention, "multi_query", False):
        return _plain(heads, 1, dim)
    return _plain(1, 1, dim) * heads


def _big_code(attention: nn.Module, heads: int, key_heads: int, dim: int) -> tuple[Part, ...]:
    if getattr(attention, "multi_query", False):
        return _plain(heads, 1, dim)
    return _plain(1, 1, dim) * heads


def _code_gen(attention: nn.Module, heads: int, key_heads: int, dim: int) -> tuple[Part, ...]:
    # Four slices (of the TPUs that it was trained on), each with its queries, values and keys, in that order.
    size = heads // 4 * dim
    return (Part("query", size), Part("value", size), Part("key", size)) * 4


_BY_CLASS: dict[str, Callable[[nn.Module, int, int, int], tuple[Part, ...]]] = {
    "FalconAttention": _falcon,
    "GPTBigCodeAttention": _big_code,
    "CodeGenAttention": _code_gen,
}


def _config(ancestors: Sequence[nn.Module]) -> Any:
    """The config of the nearest module that has one and knows its heads (a vision tower has its own), or None."""
    for module in ancestors:
        config = getattr(module, "config", None)
        for candidate in (config, getattr(config, "text_config", None)):
            if _integer(candidate, _HEADS):
                return candidate
    return None


def width_of(modules: Sequence[nn.Module]) -> int | None:
    """The model's hidden size, by the first of these modules or the nearest config that states it."""
    return _integer(modules[0], _WIDTH) or _integer(_config(modules), _WIDTH)


def _integer(holder: Any, names: Sequence[str]) -> int | None:
    """The first of these attributes that is a positive integer."""
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
