"""The base from its config.json alone: weights, keys and values, operations. Nothing is downloaded, hashed or loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hydra_core.base import EMBEDDED_BASE, AttentionMetadata, Base, BaseIdentity, BaseVocabulary, KVCache, VocabHead
from hydra_core.base.config_values import SHAPES, config_value, layers_differ
from hydra_core.base.embedded import MEMBER
from hydra_core.base.embedded import SHAPE as EMBEDDED_SHAPE
from hydra_core.base.formats import DTYPES, quantised_by
from hydra_core.base.linear import SCALES_BYTES
from hydra_core.base.resolve import LAYOUT, ORIGIN, weight_files
from hydra_core.errors import InputError
from hydra_core.kernels.ops import INT4_GROUP

GATED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are q, k, v, output, gate, up and down, so that their parameters can be counted from the shape."""
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
META = torch.device("meta")
"""Tensors there have a shape and no memory."""
CPU = torch.device("cpu")


class NotHere(Exception):
    """The sizes of the base cannot be told, as its config.json is not on this machine; the message says what to do."""


class _Shapes:
    """The part of a decoder that tells its cache's bytes: every decoder with a `KVCache` computes them from this shape."""

    supports_tree, ragged = True, False

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.layers, self.dtype = config.num_hidden_layers, dtype
        self.kv_heads = config_value(config, "num_key_value_heads", "num_attention_heads")
        self.head_width = config_value(config, "head_dim") or config.hidden_size // config.num_attention_heads

    def cache_bytes(self, rows: int, slots: int) -> int:
        return KVCache.bytes_for(self.layers, rows, slots, self.kv_heads, self.head_width, self.dtype)

    def allocate(self, rows: int, slots: int) -> Any:
        raise NotImplementedError

    def __call__(self, ids: torch.Tensor, cache: Any, metadata: AttentionMetadata,
                 counts: torch.Tensor | None = None, taps: Sequence[int] = ()) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class BaseShape:
    """A base that is not loaded. `parameters`: of everything; `layer_matrices`: of them, those that 4 bits pack; `tied`: the
    embedding is the vocabulary projection too; `limit`: tokens of prompt and answer; `stored`: bytes of the weights' files, None
    where they are not here."""

    name: str
    config: Any
    dtype: str
    parameters: int
    layer_matrices: int
    tied: bool
    limit: int
    stored: int | None = None

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config.vocab_size)

    @property
    def item(self) -> int:
        """Bytes of a value of hidden states, keys and values."""
        return DTYPES[self.dtype].itemsize

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Bytes of the weights in a format, by default the settings' own. 4-bit codes stand beside the values in bf16, which
        steps of many rows multiply. A model that transformers loads quantised has about the bytes of its files."""
        if quantised_by(self.config) is not None and self.stored:
            return self.stored
        dtype = dtype or self.dtype
        codes = self.layer_matrices // 2 + self.layer_matrices // INT4_GROUP * SCALES_BYTES if dtype.startswith("int4") else 0
        return self.parameters * DTYPES[dtype].itemsize + codes

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a step of few rows reads: everything but the embedding, of which a step reads some rows."""
        embedding = 0 if self.tied else self.vocab_size * self.width * self.item
        packed = self.layer_matrices * self.item if self.dtype.startswith("int4") else 0
        return self.weight_bytes() - embedding - packed

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with."""
        return self.parameters - (0 if self.tied else self.vocab_size * self.width)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.planned().decoder.cache_bytes(1, 1)

    def vocabulary(self, dtype: torch.dtype | None = None) -> BaseVocabulary:
        """Embedding and vocabulary projection without memory."""
        kind = dtype or DTYPES[self.dtype]
        table = torch.empty(self.vocab_size, self.width, dtype=kind, device=META)
        head = table if self.tied else torch.empty_like(table)
        identity = BaseIdentity(self.name, "0" * 64, self.dtype)
        eps = config_value(self.config, "rms_norm_eps", "layer_norm_eps") or 1e-5
        return BaseVocabulary(identity, self.config, (), table, torch.empty(self.width, dtype=kind, device=META), eps,
                              VocabHead(head))

    @property
    def vocabulary_bytes(self) -> int:
        """Bytes of embedding and vocabulary projection, which a trainer loads."""
        return self.vocab_size * self.width * self.item * (1 if self.tied else 2)

    def planned(self) -> Base:
        """A base that `hydra_core.decoding.memory` takes for its estimates."""
        return Base(self.vocabulary(), _Shapes(self.config, DTYPES[self.dtype]), None, self.limit, META)


def shape_of(model: str, dtype: str, limit: int | None, cache: Path) -> BaseShape:
    """The shape of `model`. `dtype`: its weight format, `auto` counts as bf16; `limit`: `base.context_limit`.

    Raises NotHere where its config.json is not on this machine, InputError for one that cannot be read.
    """
    name, folder, values = _find(model, cache)
    try:
        config = _text_config(values, model, folder)
        return shape_from(name, config, "bf16" if dtype == "auto" else dtype, limit, folder)
    except (AttributeError, TypeError, RuntimeError, ValueError, ZeroDivisionError) as error:  # anything may stand in such a file
        raise NotHere(f"config.json is of a kind whose sizes are not known ({type(error).__name__}: "
                      f"{' '.join(str(error).split())[:100]})") from None


def shape_from(name: str, config: Any, dtype: str, limit: int | None = None, folder: Path | None = None) -> BaseShape:
    """The shape of a text configuration; `folder`: where the weights may be, whose headers tell the parameters exactly.

    Raises NotHere for one whose sizes cannot be told.
    """
    shapes = _stored_shapes(folder) if folder is not None else {}
    heads = {key for key in shapes if key.endswith(("lm_head.weight", "embed_out.weight"))}
    said = config_value(config, "tie_word_embeddings")
    tied = bool(said) if said is not None else not heads if shapes else config_value(config, "model_type") not in GATED
    own = config_value(config, "max_position_embeddings") or limit
    if own is None:
        raise NotHere("has no longest context of its own: set base.context_limit")
    context = min(limit, own) if limit else own
    if shapes and quantised_by(config) is None:
        counted = {key: shape for key, shape in shapes.items() if not (tied and key in heads)}
        parameters = sum(_numel(shape) for shape in counted.values())
    elif (model_type := config_value(config, "model_type")) in GATED and layers_differ(config) is None:
        parameters = gated_parameters(config, tied)
    else:
        parameters = _built_parameters(config, model_type)
    stored = sum(path.stat().st_size for path in weight_files(folder)) if shapes and folder is not None else None
    largest = _largest(config)
    return BaseShape(name, largest, dtype, parameters, _layer_matrices(largest), tied, context, stored)


def _largest(config: Any) -> Any:
    """The configuration with the largest of values that layers differ in."""
    differing = {name: max(value) for name in SHAPES if isinstance(value := config_value(config, name), list | tuple) and value}
    return SimpleNamespace(**{**vars(config), **differing}) if differing else config


def gated_parameters(config: Any, tied: bool) -> int:
    """Parameters of a model of one of the GATED types: matrices, norms, and the biases and norms of heads that some have."""
    width, layers = config.hidden_size, config.num_hidden_layers
    heads, head = config.num_attention_heads, _head_width(config)
    kv = (config_value(config, "num_key_value_heads") or heads) * head
    norms = 2 * width
    if config.model_type == "qwen2":
        norms += heads * head + 2 * kv  # the biases of q, k and v
    elif config.model_type == "qwen3":
        norms += 2 * head
    if config_value(config, "attention_bias"):
        norms += heads * head + 2 * kv + width
    return _layer_matrices(config) + layers * norms + width + config.vocab_size * width * (1 if tied else 2)


def _layer_matrices(config: Any) -> int:
    width, head, heads = config.hidden_size, _head_width(config), config.num_attention_heads
    kv = (config_value(config, "num_key_value_heads") or heads) * head
    inner = config_value(config, "intermediate_size") or 4 * width
    return int(config.num_hidden_layers * (width * (heads * head + 2 * kv) + heads * head * width + 3 * width * inner))


def _head_width(config: Any) -> int:
    return int(config_value(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def _built_parameters(config: Any, model_type: str) -> int:
    """Of an architecture of another kind: transformers' own class, built without memory. It takes seconds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with META:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**vars(config)))
    except Exception as error:  # each model's class raises its own types
        raise NotHere(f"the parameters of model type {model_type} cannot be counted without its weights "
                      f"({type(error).__name__})") from None
    return sum(tensor.numel() for tensor in {id(one): one for one in model.parameters()}.values())


def _find(model: str, cache: Path) -> tuple[str, Path | None, Mapping[str, Any]]:
    """Name, folder of weights or None, and config.json of a base, wherever it stands already."""
    if model == EMBEDDED_BASE:
        stem = Path(MEMBER).stem
        folder = _converted(cache, stem)
        return stem, folder, EMBEDDED_SHAPE if folder is None else _read(folder, model)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        folder = _converted(cache, path.stem)
        if folder is None:
            raise NotHere("is a GGUF file that no stage has unpacked yet: sizes are known after the first one")
        return path.stem, folder, _read(folder, model)
    if path.is_dir():
        made_from = path / ORIGIN
        name = json.loads(made_from.read_text(encoding="utf-8"))["name"] if made_from.exists() else path.name
        return name, path, _read(path, model)
    if path.is_absolute() or "://" in model:
        raise NotHere("is not on this machine")
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    if not isinstance(found, str):
        raise NotHere(f"is not on this machine: `hf download {model} config.json` is enough for a plan")
    return model, Path(found).parent, _read(Path(found).parent, model)


def _converted(cache: Path, stem: str) -> Path | None:
    found = sorted((cache / "converted").glob(f"{stem}-*-{LAYOUT}/config.json"))
    return found[-1].parent if found else None


def _read(folder: Path, model: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"base.model={model}: has no config.json: it is not a transformers model folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"base.model={model}: config.json cannot be read ({error})") from None
    return values


def _text_config(values: Mapping[str, Any], model: str, folder: Path | None) -> Any:
    own = dict(values.get("text_config") or values)
    own.setdefault("quantization_config", values.get("quantization_config"))
    if all(own.get(name) for name in NEEDED):
        return SimpleNamespace(**own)
    from transformers import AutoConfig  # names or defaults of its own

    try:
        config = AutoConfig.from_pretrained(folder or model, trust_remote_code=False).get_text_config()
        missing = [name for name in NEEDED if not config_value(config, name)]
    except Exception as error:  # each model's configuration raises its own types
        raise InputError(f"base.model={model}: config.json: {' '.join(str(error).split())[:200]}") from None
    if missing:
        raise NotHere(f"config.json names no {missing[0]}: its sizes are not known")
    return config


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, of the headers of its .safetensors files; empty where one is missing or cannot be read."""
    found: dict[str, list[int]] = {}
    try:
        files = weight_files(folder)
        for path in files:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, struct.error):
        return {}
    return found


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
