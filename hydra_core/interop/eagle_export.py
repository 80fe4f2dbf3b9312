"""EAGLE-3 folders, as vLLM, SGLang and llama.cpp read them alike: names, offsets of the draft vocabulary, config.json.

Read for it: vLLM 0.32's `model_executor/models/llama_eagle3.py`. Loaders of these engines skip what they do not know, so the
subset that all of them read is written: `norm_before_residual` false, no norms before or after `fc`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.errors import InputError
from hydra_core.heads.eagle import Eagle
from hydra_core.interop.vllm_format import KEY

ARCHITECTURE = "LlamaForCausalLMEagle3"


def check_eagle3(drafter: Eagle, vocabulary: BaseVocabulary) -> None:
    """Raise InputError for a layer that an EAGLE-3 folder cannot say."""
    if not drafter.taps:
        raise InputError(f"kind={drafter.config.kind}: reads the last hidden state with EAGLE-3's layer, which no engine runs: "
                         "train kind=eagle3")
    if vocabulary.head.bias is not None or vocabulary.head.softcap is not None:
        raise InputError("the base's vocabulary projection has a bias or a soft cap, for which an EAGLE-3 folder has no place")


def eagle3_tensors(drafter: Eagle) -> dict[str, Tensor]:
    """The tensors of the folder, in the dtype of the vocabulary rows."""
    layer, rows = drafter.layer, drafter.rows
    width, key = layer.query_heads * layer.head_width, layer.kv_heads * layer.head_width
    query, keys, values = torch.split(layer.qkv.weight, [width, key, key])
    gate, up = layer.gate_up.weight.chunk(2)
    own = {"fc": layer.fc.weight, "midlayer.input_layernorm": layer.input_norm.weight,
           "midlayer.hidden_norm": layer.hidden_norm.weight, "midlayer.self_attn.q_proj": query,
           "midlayer.self_attn.k_proj": keys, "midlayer.self_attn.v_proj": values,
           "midlayer.self_attn.o_proj": layer.output.weight, "midlayer.post_attention_layernorm": layer.mlp_norm.weight,
           "midlayer.mlp.gate_proj": gate, "midlayer.mlp.up_proj": up, "midlayer.mlp.down_proj": layer.down.weight,
           "norm": layer.norm.weight, "lm_head": rows.weight * rows.scale}
    made = {f"{name}.weight": tensor.detach().to("cpu", rows.weight.dtype).contiguous().clone() for name, tensor in own.items()}
    ids = drafter.draft_vocab.ids.cpu()
    drafted = torch.zeros(drafter.draft_vocab.size, dtype=torch.bool)
    drafted[ids] = True
    order = torch.argsort(ids)  # the engines' own files are in the order of the target's ids
    made["lm_head.weight"] = made["lm_head.weight"][order].contiguous()
    return made | {"d2t": ids[order] - torch.arange(len(ids)), "t2d": drafted}


def eagle3_config(drafter: Eagle, vocabulary: BaseVocabulary) -> dict[str, Any]:
    """config.json. The layer's rotary positions are plain ones, whatever scaling the base has."""
    layer, base = drafter.layer, vocabulary.config
    theta = (getattr(base, "rope_parameters", None) or {}).get("rope_theta") or 10000.0
    taps = list(drafter.taps)
    return {
        "architectures": [ARCHITECTURE], "model_type": "llama", "hidden_size": vocabulary.width,
        "intermediate_size": layer.gate_up.weight.shape[0] // 2, "num_attention_heads": layer.query_heads,
        "num_key_value_heads": layer.kv_heads, "head_dim": layer.head_width, "num_hidden_layers": 1, "rms_norm_eps": layer.eps,
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "max_position_embeddings": base.max_position_embeddings,
        "vocab_size": vocabulary.size, "draft_vocab_size": len(drafter.draft_vocab), "tie_word_embeddings": False,
        "bos_token_id": getattr(base, "bos_token_id", None), "eos_token_id": next(iter(vocabulary.stop_ids), None),
        "norm_before_residual": False, "norm_before_fc": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": taps, "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": taps, "torch_dtype": str(drafter.rows.weight.dtype).removeprefix("torch."),
        KEY: {"base": {"name": vocabulary.identity.name, "digest": vocabulary.identity.digest}}}
