"""Loads the frozen base, the whole of it or only its embedding and vocabulary projection."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydra_core.base.agreement import check_head, reference_of, why_different
from hydra_core.base.config_values import config_value
from hydra_core.base.fallback import TransformersDecoder
from hydra_core.base.formats import LOSSY, check_lossy, compute_dtype, own_codes, own_formats, quantise_layers, quantised_by
from hydra_core.base.fused import FusedDecoder
from hydra_core.base.model import Base, Decoder
from hydra_core.base.probe import FINAL_NORMS, Surroundings, decoder_of, final_norm, look_around
from hydra_core.base.q4_1 import Q4Matrix
from hydra_core.base.resolve import ResolvedBase, default_cache, resolve_base, weight_files
from hydra_core.base.sequential import SequentialDecoder
from hydra_core.base.text import load_tokenizer
from hydra_core.base.text_base import WeightlessBase
from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary, VocabHead
from hydra_core.errors import InputError

log = logging.getLogger(__name__)

EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")
NORMS = (*(f"{part}.{name}.weight" for part in ("model", "transformer", "decoder") for name in FINAL_NORMS),
         "final_layer_norm.weight", "ln_f.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
"""Names, or their ends, that checkpoints give to the ends of a model where these are not the model class's own."""


@dataclass(frozen=True)
class _Wanted:
    """Which base is loaded, and how; see `load_base`. `config`: the transformers text configuration; `limit`: tokens of prompt
    and answer."""

    resolved: ResolvedBase
    config: Any
    model: str
    dtype: str
    device: torch.device
    limit: int
    fused: bool
    widen: bool
    native: bool


def load_base(model: str, *, dtype: str = "bf16", device: str = "cpu", cache: Path | None = None,
              context_limit: int | None = None, fused: bool = True, widen: bool = False, native: bool = True) -> Base:
    """Load and freeze the base.

    `dtype`: the weight format: bf16, fp32, int4 (a Q4_1 checkpoint's own codes, on a CPU) or int4-lossy (4-bit codes that are
    made here for any fused base, which changes its answers); `device`: cpu, cuda or auto; `cache`: folder for downloaded and
    converted models (default: `default_cache()`); `context_limit`: tokens of prompt and answer, at most the model's own limit;
    `fused=False` forces transformers' own forward; `native=False` forces PyTorch's operators instead of compiled kernels;
    `widen` computes in float64 on the values of the weight format, to decide near-ties.
    The logits of eight token ids are compared with those of transformers' own forward. Where the fastest decoder gives others,
    the next one is taken. Raises InputError for a model that cannot be found or loaded, not in that format, or whose logits no
    decoder reproduces.
    """
    resolved, target = resolve_base(model, cache or default_cache()), pick_device(device)
    config = _read_config(resolved, model)
    wanted = _Wanted(resolved, config, model, dtype, target, _context_limit(config, context_limit, model), fused, widen, native)
    loaded, codes = _load_weights(wanted)
    reference = reference_of(loaded, model)
    tokenizer = load_tokenizer(resolved.folder)
    identity = BaseIdentity(resolved.name, resolved.digest, dtype)
    vocabulary = _vocabulary_of(loaded, config, identity, _stop_ids(loaded, config, tokenizer), look_around(resolved.folder))
    check_head(vocabulary, reference, model)
    different, decoders = None, _decoders(wanted, loaded, codes)
    del loaded, codes  # `_decoders` has to be able to free them
    for decoder in decoders:
        base = Base(vocabulary, decoder, tokenizer, wanted.limit, target)
        different = why_different(base, reference)
        if different is None:
            return base
        log.warning("%s does not compute what transformers' own forward does (%s)", type(decoder).__name__, different)
        del base, decoder  # the weights may be loaded again for the next one
    raise InputError(f"base.model={model}: no decoder of this engine computes what transformers' own forward does ({different}): "
                     "this architecture is not supported in this weight format")


def formats_of(model: str, *, cache: Path, device: str) -> tuple[str, ...]:
    """Weight formats that keep the checkpoint's own values, on a device of kind cpu or cuda: the choices of `auto`.

    No weights are read. Raises InputError for a model that cannot be found or loaded.
    """
    resolved = resolve_base(model, cache)
    config = _read_config(resolved, model)
    with _checked(model):
        return own_formats(resolved.folder, config, device)


def quantisation(model: str, *, cache: Path) -> str | None:
    """The method of a model that transformers loads quantised, which can be computed in no other format; None for others.

    No weights are read. Raises InputError for a model that cannot be found or loaded.
    """
    return quantised_by(_read_config(resolve_base(model, cache), model))


def load_weightless(model: str, *, dtype: str = "bf16", cache: Path, context_limit: int | None = None) -> WeightlessBase:
    """The base without its weights: tokenizer, end-of-turn ids, limits and identity, as `load_base` gives them.

    Raises InputError for a model that cannot be found.
    """
    resolved = resolve_base(model, cache)
    config, tokenizer = _read_config(resolved, model), load_tokenizer(resolved.folder)
    with _checked(model):
        stops = _collect_stops(_generation(resolved), config, tokenizer)
    return WeightlessBase(resolved.folder, BaseIdentity(resolved.name, resolved.digest, dtype), tokenizer, stops,
                          int(config.vocab_size), _context_limit(config, context_limit, model))


def load_vocabulary(model: str, *, dtype: str = "bf16", device: str = "cpu", cache: Path) -> BaseVocabulary:
    """Load only the embedding, the vocabulary projection and the final norm, which are all that a trainer needs of the base.

    Raises InputError for a model that cannot be found or loaded.
    """
    resolved = resolve_base(model, cache)
    config = _read_config(resolved, model)
    target, kind = pick_device(device), compute_dtype(dtype)
    around = look_around(resolved.folder)
    with _checked(model):
        files = _tensor_files(resolved.folder)
        if quantised_by(config) is None:
            _check_weights(model, _loading_info(files, around))
        embedding = _read(files, (around.embedding, *EMBEDDINGS), model)
        norm = _read(files, (around.norm, *NORMS), model) if around.norm is not None else None
        if config.tie_word_embeddings:
            weight, bias = embedding, None
        else:
            weight = _read(files, (around.head, *HEADS), model)
            bias = _read(files, ("lm_head.bias",), model) if any(name.endswith("lm_head.bias") for name in files) else None
        generation = _generation(resolved)
    embedding = embedding.to(target, kind)
    weight = embedding if config.tie_word_embeddings else weight.to(target, kind)
    head = VocabHead(weight, None if bias is None else bias.to(target, kind), around.scale, around.softcap)
    identity = BaseIdentity(resolved.name, resolved.digest, dtype)
    stops = _collect_stops(generation, config, load_tokenizer(resolved.folder))
    norm = _norm_weight(None if norm is None else norm.to(target, kind), embedding, around)
    return BaseVocabulary(identity, config, stops, embedding, norm, _norm_eps(config), head)


def _generation(resolved: ResolvedBase) -> Any:
    """The model's generation settings, None where its folder has none."""
    from transformers import GenerationConfig

    has = (resolved.folder / "generation_config.json").exists()
    return GenerationConfig.from_pretrained(resolved.folder) if has else None


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


def _load_weights(wanted: _Wanted) -> tuple[Any, Mapping[str, Q4Matrix] | None]:
    """transformers' own model with the values of the weight format, and the 4-bit codes that products are to use, if any."""
    folder, config, dtype, limit = wanted.resolved.folder, wanted.config, wanted.dtype, wanted.limit
    kind, codes = compute_dtype(dtype), None
    if dtype == LOSSY:
        check_lossy(folder, config, wanted.model, wanted.device.type, wanted.fused, limit)
    if wanted.widen and (method := quantised_by(config)) is not None:
        raise InputError(f"base.model={wanted.model}: is quantised by {method} and cannot be computed in float64")
    if dtype == "int4" and not wanted.widen:
        codes = own_codes(folder, config, wanted.model, wanted.device.type, wanted.fused, limit)
    # only float32 holds 4-bit values exactly, both those of a Q4_1 checkpoint and those that are made here
    whole = dtype == LOSSY or (dtype == "int4" and wanted.widen)
    loaded = _load_transformers(wanted, torch.float32 if whole else kind)
    if dtype == LOSSY:
        log.warning("base.dtype=%s: %s is quantised to 4 bits here, so its answers differ from the model's own", dtype,
                    wanted.model)
        codes = quantise_layers(loaded, wanted.model)
    if wanted.widen:
        return loaded.double(), None
    return loaded.to(kind) if whole else loaded, codes


def _load_transformers(wanted: _Wanted, dtype: torch.dtype) -> Any:
    """transformers' own model, frozen. A quantised one is loaded on its device at once, since it cannot be moved."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    resolved, config, asked, device = wanted.resolved, wanted.config, wanted.model, wanted.device
    method = quantised_by(config)
    place: dict[str, Any] = {} if method is None else {"device_map": {"": device}}
    try:
        with _checked(asked):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                resolved.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=method is None,  # named below, with both shapes
                attn_implementation=_attention_for(AutoModelForCausalLM, config, wanted.limit), **place)
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


def _attention_for(auto: Any, config: Any, limit: int) -> str | None:
    """An attention implementation that applies the tree mask; None, if no tree is possible, lets transformers choose."""
    if TransformersDecoder.reason_unsupported(config, limit) is not None:
        return None
    known = type(config) in auto._model_mapping
    return "sdpa" if not known or getattr(auto._model_mapping[type(config)], "_supports_sdpa", False) else "eager"


def _decoders(wanted: _Wanted, loaded: Any, codes: Mapping[str, Q4Matrix] | None) -> Iterator[Decoder]:
    """The decoders that may run the model, the fastest first. Each is asked for only once the one before is rejected."""
    config, limit, method = wanted.config, wanted.limit, quantised_by(wanted.config)
    reason = (f"quantised by {method}" if method else FusedDecoder.reason_unsupported(config, limit) if wanted.fused
              else "asked not to fuse")
    if reason is None:
        made = FusedDecoder(loaded, codes, wanted.native)
        yield made
        if made.without_kernels():
            yield made
        if codes is not None:
            return  # no other decoder multiplies by 4-bit codes
        del made, loaded  # the fused decoder took the weights over; two copies may not fit
        loaded, _ = _load_weights(wanted)
        reason = "it computes something else"
    why_not = TransformersDecoder.reason_unsupported(config, limit)
    if why_not is None:
        if wanted.fused:
            log.warning("the base uses transformers' own forward, not the fused one (%s)", reason)
        yield TransformersDecoder(loaded, limit)
        why_not = "the draft tree of this one gives other logits"
    log.warning("the base decodes plainly, one sequence after another: only models of attention alone can verify a draft tree "
                "(%s)", why_not)
    yield SequentialDecoder(loaded)


def _vocabulary_of(model: Any, config: Any, identity: BaseIdentity, stops: tuple[int, ...],
                   around: Surroundings) -> BaseVocabulary:
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    embedding = model.get_input_embeddings().weight.detach()
    norm = getattr(final_norm(decoder_of(model)), "weight", None)
    vocab_head = VocabHead(head.weight.detach(), None if bias is None else bias.detach(), around.scale, around.softcap)
    return BaseVocabulary(identity, config, stops, embedding, _norm_weight(norm, embedding, around), _norm_eps(config),
                          vocab_head.for_decoding())


def _norm_weight(weight: Tensor | None, embedding: Tensor, around: Surroundings) -> Tensor:
    """What the final norm multiplies by, [D]: its weight, in some families with one added; ones for a norm without weights."""
    if weight is None:
        return torch.ones_like(embedding[0])
    return weight.detach().float() + around.norm_offset if around.norm_offset else weight.detach()


def _norm_eps(config: Any) -> float:
    return float(config_value(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") or 1e-5)


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
    own = config_value(config, "max_position_embeddings") or asked
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


def _loading_info(files: Mapping[str, Path], around: Surroundings) -> dict[str, Any]:
    """As transformers' own loading tells: the tensors that the files lack or hold in another shape. Only headers are read.

    A checkpoint that names any tensor otherwise than the model class does is converted while it is loaded; nothing is told of it.
    """
    wrong = [(name, shape, around.weights[name]) for name, shape in _shapes(files).items()
             if name in around.weights and shape != around.weights[name]]
    missing = set(around.weights) - set(files) if set(files) <= set(around.weights) else set()
    return {"mismatched_keys": wrong, "missing_keys": missing}


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as handle:
            found |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys() if name in files}  # noqa: SIM118
    return found


def _read(files: dict[str, Path], endings: tuple[str, ...], model: str) -> Tensor:
    """The tensor whose name is, or ends with, one of `endings`. Raises InputError if there is none."""
    for ending in endings:
        for name, path in files.items():
            if name == ending or name.endswith("." + ending):
                with safe_open(path, framework="pt") as handle:
                    tensor: Tensor = handle.get_tensor(name)
                    return tensor
    raise InputError(f"base.model={model}: it has no tensor with the name {' or '.join(filter(None, endings))}")
