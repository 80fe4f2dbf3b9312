"""Values of transformers configurations, which may lack them or have one for each layer."""

from __future__ import annotations

from typing import Any


def config_value(config: Any, *names: str) -> Any:
    """The first of `names` that has a value other than None; None where there is none, or where layers differ in it."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers' own answer where a value is not the same for all layers
            continue
        if value is not None:
            return value
    return None


SHAPES = ("head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size")
CACHED_SHAPES = ("head_dim", "num_key_value_heads")
"""Those that fix the shape of a layer's keys and values."""


def layers_differ(config: Any, names: tuple[str, ...] = SHAPES) -> str | None:
    """Which of `names` are not the same for all layers, or None. (Gemma 4 has such layers.)"""
    differing = getattr(config, "per_layer_attributes", None) if getattr(config, "is_heterogeneous", False) else None
    found = [name for name in names if name in (differing or ()) or isinstance(config_value(config, name), list | tuple)]
    return ", ".join(found) or None


def longrope_limit(config: Any) -> int | None:
    """Positions up to which a model with longrope keeps one set of frequencies, or None for other models."""
    parameters = config_value(config, "rope_parameters") or {}
    found = []
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":
            own = rope.get("original_max_position_embeddings") or config_value(config, "original_max_position_embeddings")
            found.append(int(own or 0))
    return min(found, default=None)
