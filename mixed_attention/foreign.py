"""Fields of a configuration that no layer here reads: which may pass, and which would change what is computed.

A transformer block hands everything it knows to its attention, the fields of its norms, its MLP and its embeddings
among them; those pass. A field that says of an attention how it computes must not be ignored: it is refused by its
name, unless its value is what the layers do anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_SLOT = "(q|k|v|qk|kv|qkv|query|key|value|query_key|head)"
_NORM = "(rms_?|layer_?|l2_?)?norm(ali[sz]e[ds]?|ali[sz]ation)?"
_SCORES = "(attn|attention|softmax|logits?|scores?|q|k|qk|query|key)"


def _is_off(value: Any, settings: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in ("", "none", "off", "false")
    is_plain = isinstance(value, (bool, int, float, tuple, list))
    return value is None or (is_plain and value in (0, -1, (), [], (-1, -1), [-1, -1]))


def _is_our_scale(value: Any, settings: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _is_off(value, settings) or (is_number and abs(value * settings.head_dim**0.5 - 1) < 1e-6)


def _equals(field: str) -> Callable[[Any, Any], bool]:
    return lambda value, settings: value is None or value == getattr(settings, field)


def _is_our_rotation(value: Any, settings: Any) -> bool:
    return value is None or not isinstance(value, bool) or value == settings.use_rope


def _rotates_whole_heads(value: Any, settings: Any) -> bool:
    return value is None or not settings.use_rope or value in (1, settings.head_dim)


def _is_softmax(value: Any, settings: Any) -> bool:
    return value.lower() == "softmax" if isinstance(value, str) else value is not False


_RULES: tuple[tuple[str, Callable[[Any, Any], bool]], ...] = (
    (r"(.*_)?(causal|window|alibi|sinks?|soft_?cap(ping)?|logits?_cap|talking_heads?)(_.*)?", _is_off),
    # Norms of queries and keys; those of the block ("norm", "pre_norm", "norm_eps") are its own.
    (rf"((use|with)_)?{_SLOT}_?{_NORM}(_.*)?", _is_off),
    (rf"{_NORM}_{_SLOT}s?", _is_off),
    (r"mask(_type)?|(attn|attention)_mask(_.*)?|(mask|score)_mod", _is_off),
    (rf"scale|scaling|scale_{_SCORES}|{_SCORES}_(scale|scaling|scalar|multiplier)", _is_our_scale),
    (r"((softmax|attn|attention|logits?)_)?temperature", _is_off),
    (r"query_pre_attn_scalar", _equals("head_dim")),
    (r"(attn|attention|score|pos|position|rel_pos|relative|relative_position|distance)_bias(_.*)?", _is_off),
    (r"gated?_(attn|attention)|(attn|attention)_(output_)?gate|add_bias_kv|add_zero_attn", _is_off),
    (r"(q|k|v|qk|kv|qkv|query|key|value|proj|out|[qkvo]_proj|out_proj)_bias", _equals("bias")),
    (r"use_bias", _equals("bias")),
    (r"((num|n)_)?(kv|key_value)_heads", _equals("num_heads")),
    (r"dim_head|((v|value)_)head_dim|head_dim_v|(v|value)_dim(_head)?", _equals("head_dim")),
    (r"(attn|attention)_p?drop(out)?(_.*)?|attention_probs_dropout_prob|dropout_p|proj_drop(out)?", _equals("dropout")),
    (r"(cosine|linear|differential|diff|sparse|dilated|local|block_sparse)_(attn|attention)(_.*)?", _is_off),
    (r"(attn|attention|softmax|score)_(activation|function|fn)|softmax", _is_softmax),
    # Angles are an argument of the call; which channels they turn is not.
    (r"(use_)?rotary(_emb(edding)?s?)?|rope", _is_our_rotation),
    (r"partial_rotary_factor|(rotary|rope)_(pct|percentage|fraction|dim|ndims)", _rotates_whole_heads),
)
"""Names, and whether a value is what the layers do anyway."""


def may_matter(name: str) -> bool:
    """Whether a field of that name may say how an attention computes."""
    return any(re.fullmatch(pattern, name.lower()) for pattern, _ in _RULES)


def refuse(fields: Mapping[str, Any], settings: Any) -> None:
    """Refuses fields that would change what an attention computes, were they known.

    Args:
        fields: Those that nobody reads.
        settings: The configuration of a layer.

    Raises:
        ValueError: If there is one, whose value is not what the layer does anyway.
    """
    for name, value in fields.items():
        for pattern, is_harmless in _RULES:
            if re.fullmatch(pattern, name.lower()) and not is_harmless(value, settings):
                raise ValueError(
                    f"{name}: this field is not known here and would change what is computed, got {value!r}; "
                    "leave it out where it is meant for another module"
                )
