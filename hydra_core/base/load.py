"""Loads the frozen base, the whole of it or only its embedding and vocabulary projection."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydra_core.base.fallback import TransformersDecoder
from hydra_core.base.formats import LOSSY, check_lossy, compute_dtype, own_codes, own_formats, quantise_layers, quantised_by
from hydra_core.base.fused import FusedDecoder
from hydra_core.base.model import Base
from hydra_core.base.q4_1 import Q4Matrix
from hydra_core.base.resolve import ResolvedBase, default_cache, resolve_base, weight_files
from hydra_core.base.sequential import SequentialDecoder
from hydra_core.base.text import load_tokenizer
from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary, VocabHead
from hydra_core.errors import InputError

log = logging.getLogger(__name__)

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


def load_base(model: str, *, dtype: str = "bf16", device: str = "cpu", cache: Path | None = None,
              context_limit: int | None = None, fused: bool = True, widen: bool = False, native: bool = True) -> Base:
    """Load and freeze the base.

    `dtype`: the weight format: bf16, fp32, int4 (a Q4_1 checkpoint's own codes, on a CPU) or int4-lossy (4-bit codes that are
    made here for any fused base, which changes its answers); `device`: cpu, cuda or auto; `cache`: folder for downloaded and
    converted models (default: `default_cache()`); `context_limit`: tokens of prompt and answer, at most the model's own limit;
    `fused=False` forces transformers' own forward; `native=False` forces PyTorch's operators instead of compiled kernels;
    `widen` computes in float64 on the values of the weight format, to decide near-ties.
    Raises InputError for a model that cannot be found or loaded, or not in that format.
    """
    resolved, kind, target = resolve_base(model, cache or default_cache()), compute_dtype(dtype), pick_device(device)
    config = _read_config(resolved, model)
    if dtype == LOSSY:
        check_lossy(resolved.folder, config, model, target.type, fused)
    if widen and (method := quantised_by(config)) is not None:
        raise InputError(f"base.model={model}: is quantised by {method} and cannot be computed in float64, so near-ties "
                         "cannot be decided")
    codes = own_codes(resolved.folder, config, model, target.type, fused) if dtype == "int4" and not widen else None
    # only float32 holds 4-bit values exactly, both those of a Q4_1 checkpoint and those that are made here
    whole = dtype == LOSSY or (dtype == "int4" and widen)
    loaded = _load_transformers(resolved, config, model, torch.float32 if whole else kind, target)
    if dtype == LOSSY:
        log.warning("base.dtype=%s: %s is quantised to 4 bits here, so its answers differ from the model's own", dtype, model)
        codes = quantise_layers(loaded, model)
    if widen:
        loaded, codes = loaded.double(), None
    elif whole:
        loaded = loaded.to(kind)
    own = loaded.config.get_text_config()
    identity = BaseIdentity(resolved.name, resolved.digest, dtype)
    tokenizer = load_tokenizer(resolved.folder)
    vocabulary = _vocabulary_of(loaded, own, identity, _stop_ids(loaded, own, tokenizer))
    decoder = _decoder_for(loaded, own, fused, codes, quantised_by(config), native)
    limit = _context_limit(own, context_limit, model)
    return Base(vocabulary, decoder, tokenizer, limit, target)


def formats_of(model: str, *, cache: Path, device: str) -> tuple[str, ...]:
    """Weight formats that keep the checkpoint's own values, on a device of kind cpu or cuda: the choices of `auto`.

    No weights are read. Raises InputError for a model that cannot be found or loaded.
    """
    resolved = resolve_base(model, cache)
    config = _read_config(resolved, model)
    with _checked(model):
        return own_formats(resolved.folder, config, device)


def load_vocabulary(model: str, *, dtype: str = "bf16", device: str = "cpu", cache: Path) -> BaseVocabulary:
    """Load only the embedding, the vocabulary projection and the final norm, which are all that a trainer needs of the base.

    Raises InputError for a model that cannot be found or loaded.
    """
    from transformers import GenerationConfig

    resolved = resolve_base(model, cache)
    config = _read_config(resolved, model)
    target, kind = pick_device(device), compute_dtype(dtype)
    generation = None
    with _checked(model):
        names = _tensor_files(resolved.folder)
        embedding = _read(names, ("embed_tokens.weight", "embed_in.weight", "wte.weight"), model)
        norm = _read(names, (*(f"model.{name}.weight" for name in FINAL_NORMS), "final_layer_norm.weight",
                             "transformer.ln_f.weight"), model)
        if config.tie_word_embeddings:
            weight, bias = embedding, None
        else:
            weight = _read(names, ("lm_head.weight", "embed_out.weight"), model)
            bias = _read(names, ("lm_head.bias",), model) if any(name.endswith("lm_head.bias") for name in names) else None
        if (resolved.folder / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(resolved.folder)
    embedding = embedding.to(target, kind)
    weight = embedding if config.tie_word_embeddings else weight.to(target, kind)
    head = VocabHead.of(config, weight, None if bias is None else bias.to(target, kind))
    identity = BaseIdentity(resolved.name, resolved.digest, dtype)
    stops = _collect_stops(generation, config, load_tokenizer(resolved.folder))
    return BaseVocabulary(identity, config, stops, embedding, norm.to(target, kind),
                          _norm_eps(config), head)


def context_limit(model: str, *, cache: Path, asked: int | None = None) -> int:
    """Tokens of prompt and answer that `model` supports, or `asked` if that is given. No weights are read.

    Raises InputError for a model that cannot be found or loaded, or that supports fewer than `asked`.
    """
    return _context_limit(_read_config(resolve_base(model, cache), model), asked, model)


def hidden_width(model: str, *, cache: Path) -> int:
    """D of `model`. No weights are read. Raises InputError for a model that cannot be found or loaded."""
    return int(_read_config(resolve_base(model, cache), model).hidden_size)


def pick_device(device: str) -> torch.device:
    """The torch device; `auto` is CUDA if there is one, else the CPU. Raises InputError for cuda on a machine without it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"base.device={device}: this machine has no CUDA device: use cpu or auto")
    return torch.device(device)


def _read_config(resolved: ResolvedBase, asked: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=False)
        own = config.get_text_config()
        if own is not config and getattr(config, "quantization_config", None):
            own.quantization_config = config.quantization_config  # it is beside the text model's part, not in it
        return own
    except Exception as error:  # each model's configuration raises its own types
        if "trust_remote_code" in str(error):
            raise InputError(f"base.model={asked}: its folder wants to run Python code of its own, which is refused: use a model "
                             "whose architecture transformers has") from None
        raise _unloadable(asked, f"config.json: {error}") from None


@contextmanager
def _checked(asked: str) -> Iterator[None]:
    """Turn the errors that readers raise for a damaged or truncated folder into InputError with one line."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        raise _unloadable(asked, str(error) or type(error).__name__) from None


def _unloadable(asked: str, reason: str) -> InputError:
    return InputError(f"base.model={asked}: cannot be loaded ({' '.join(reason.split())[:300]}): repair it or download it again")


def _load_transformers(resolved: ResolvedBase, config: Any, asked: str, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' own model on `device`, frozen. A quantised one is loaded on that device, since it cannot be moved."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    method = quantised_by(config)
    place: dict[str, Any] = {} if method is None else {"device_map": {"": device}}
    try:
        with _checked(asked):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                resolved.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=method is None,  # named below, with both shapes
                attn_implementation=_attention_for(AutoModelForCausalLM, config), **place)
            model, found = loaded
            if method is None:  # a quantiser makes tensors of its own out of those of the checkpoint
                _check_weights(asked, found)
    except (ImportError, RuntimeError) as error:
        if method is None:
            raise
        raise InputError(f"base.model={asked}: is quantised by {method}, which transformers cannot run here "
                         f"({' '.join(str(error).split())[:300]}): install what it asks for, or use another device") from None
    return (model if place else model.to(device)).eval().requires_grad_(False)


def _check_weights(asked: str, found: Mapping[str, Any]) -> None:
    """Raise InputError for tensors that the checkpoint lacks or has in another shape: transformers would draw them at random."""
    for name, theirs, ours in sorted(found.get("mismatched_keys") or ()):
        raise InputError(f"base.model={asked}: the tensor {name} has shape {list(theirs)}, and {list(ours)} by config.json: "
                         "repair the folder or download it again")
    if missing := sorted(found.get("missing_keys") or ()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"base.model={asked}: the tensor {missing[0]}{more} is in none of its .safetensors files: "
                         "repair the folder or download it again")


def _attention_for(auto: Any, config: Any) -> str | None:
    """An attention implementation that applies the tree mask; None, if no tree is possible, lets transformers choose."""
    if TransformersDecoder.reason_unsupported(config) is not None:
        return None
    known = type(config) in auto._model_mapping
    return "sdpa" if not known or getattr(auto._model_mapping[type(config)], "_supports_sdpa", False) else "eager"


def _decoder_for(model: Any, config: Any, fused: bool, codes: Mapping[str, Q4Matrix] | None, method: str | None,
                 native: bool) -> Any:
    """`method`: of a quantised model, whose modules contain no matrices to fuse; else None."""
    reason = f"quantised by {method}" if method else FusedDecoder.reason_unsupported(config) if fused else "asked not to fuse"
    if reason is None:
        return FusedDecoder(model, codes, native)
    why_not = TransformersDecoder.reason_unsupported(config)
    if why_not is not None:
        log.warning("the base decodes plainly, one sequence after another: only models of attention alone can verify a draft "
                    "tree (%s)", why_not)
        return SequentialDecoder(model)
    if fused:
        log.warning("the base uses transformers' own forward, not the fused one (%s)", reason)
    return TransformersDecoder(model)


def _vocabulary_of(model: Any, config: Any, identity: BaseIdentity, stops: tuple[int, ...]) -> BaseVocabulary:
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    decoder = model.get_decoder()
    norm = next((getattr(decoder, name).weight.detach() for name in FINAL_NORMS if hasattr(decoder, name)), None)
    embedding = model.get_input_embeddings().weight.detach()
    if norm is None:
        norm = torch.ones_like(embedding[0])
    vocab_head = VocabHead.of(config, head.weight.detach(), None if bias is None else bias.detach()).for_decoding()
    return BaseVocabulary(identity, config, stops, embedding, norm, _norm_eps(config), vocab_head)


def _norm_eps(config: Any) -> float:
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 1e-5


def _stop_ids(model: Any, config: Any, tokenizer: Any) -> tuple[int, ...]:
    return _collect_stops(getattr(model, "generation_config", None), config, tokenizer)


def _collect_stops(generation: Any, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-turn ids, sorted: those of the generation settings, else of the model's config, and the tokenizer's own.

    A chat template closes turns with the tokenizer's. Where the settings name others, an answer ends at either.
    """
    named = next((stops for stops in (getattr(source, "eos_token_id", None) for source in (generation, config))
                  if stops is not None), ())
    stops = {named} if isinstance(named, int) else set(named)
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None and own not in stops:
        log.warning("the model's settings end an answer at token ids %s, its tokenizer at %s: an answer ends at either",
                    sorted(stops), own)
        stops.add(own)
    return tuple(sorted(stops))


def _context_limit(config: Any, asked: int | None, model: str) -> int:
    own = getattr(config, "max_position_embeddings", None) or asked
    if own is None:
        raise InputError(f"base.context_limit: {model} has no limit of its own: set one")
    if asked is not None and asked > own:
        raise InputError(f"base.context_limit={asked}: {model} supports at most {own} tokens")
    return asked or own


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, of those that transformers reads."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as handle:
            found.update(dict.fromkeys(handle.keys(), path))
    return found


def _read(files: dict[str, Path], endings: tuple[str, ...], model: str) -> Tensor:
    """The tensor whose name is, or ends with, one of `endings`. Raises InputError if there is none."""
    for ending in endings:
        for name, path in files.items():
            if name == ending or name.endswith("." + ending):
                with safe_open(path, framework="pt") as handle:
                    tensor: Tensor = handle.get_tensor(name)
                    return tensor
    raise InputError(f"base.model={model}: it has no tensor with the name {' or '.join(endings)}")
