"""The one facade of the compiled C++ operators: every call of them, and the decision where each of them can be used.

Functions named `supports_...` say whether an operator can be called for a dtype, a device and a shape; the function of the
same name calls it. `library.py` compiles and loads the operators on first use.

Letters: M lines of a matrix, V vocabulary, D width, B sequences, N nodes per sequence, W paths per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from hydra_core.kernels.library import instruction_limit, load_library

BLOCK = 32
"""Outputs of a matrix that a packed layout keeps together; the number of outputs must be a multiple of it."""
INT4_GROUP = 32
"""Inputs that share one scale and one minimum in 4 bits, as in GGUF's Q4_1 and in `matmul_int4.h`."""
MAX_HEAD_WIDTH = 512
"""Largest width of an attention head that the compiled decoder accepts, as in `rope.h`."""

Matrix = Sequence[Tensor | None]
"""What C++ needs of one matrix: weight, bias, 4-bit codes, 4-bit scales."""
MatrixLayout = tuple[int, int]
"""The number of a matrix's layout, and the number of lines up to which its 4-bit copy is used."""


@lru_cache(maxsize=1)
def bf16_available() -> bool:
    """Whether the bfloat16 operators run here and are the fastest choice.

    They need AVX-512's bf16 dot product or AVX2. On a processor with AMX they must also have been compiled with AMX tiles:
    without them oneDNN is faster for many lines. Where `library.LIMIT` turns the tiles off, they are used without.
    """
    if not instructions():
        return False
    tiles = bool(torch.ops.hydra_heads.amx_available())
    return tiles or instruction_limit() is not None or not torch.cpu._is_amx_tile_supported()


def instructions() -> str:
    """What the bfloat16 operators are made of, whichever choice is fastest: `avx512`, `avx2`, or `` where there are none."""
    return str(torch.ops.hydra_heads.instructions()) if load_library() else ""


def amx_available() -> bool:
    """Whether the bfloat16 operators use AMX tiles here."""
    return bf16_available() and bool(torch.ops.hydra_heads.amx_available())


def supports_linear(weight: Tensor) -> bool:
    """Whether `linear` can multiply by `weight` [out, in]."""
    return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[0] % BLOCK == 0
            and weight.shape[1] % 2 == 0 and bf16_available())


def pack_weight(weight: Tensor) -> Tensor:
    """Copy `weight` [out, in] bfloat16 into the layout [out / 32, in / 2, 32, 2] that `linear` reads."""
    packed: Tensor = torch.ops.hydra_heads.pack_weight(weight.contiguous())
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of `x` [M, in] bfloat16 with a matrix from `pack_weight` and a bias [out]: [M, out].

    A line's result is the same to the last bit whatever lines are computed with it.
    """
    product: Tensor = torch.ops.hydra_heads.linear_bf16(x, packed, bias)
    return product


def linear_argmax(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Index of the largest output in each line of `linear`, the first among equals: [M] int64."""
    chosen: Tensor = torch.ops.hydra_heads.linear_argmax(x, packed, bias)
    return chosen


def supports_linear_int4(dtype: torch.dtype, out: int, width: int) -> bool:
    """Whether `linear_int4` can multiply inputs of `dtype` by a matrix of `out` x `width` on the CPU."""
    return dtype == torch.bfloat16 and out % BLOCK == 0 and width % INT4_GROUP == 0 and bf16_available()


def linear_int4(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [M, in] bfloat16 by a matrix of 4-bit codes: [M, out].

    `codes`: [out / 32, in / 8, 2, 16, 2] int16; `scales`: [out / 32, in / 32, 2, 32] float16, scale and minimum.
    """
    product: Tensor = torch.ops.hydra_heads.linear_int4(x, codes, scales, bias)
    return product


def supports_embed_rms_norm(table: Tensor) -> bool:
    """Whether `embed_rms_norm` can read `table`."""
    return table.device.type == "cpu" and table.dtype == torch.bfloat16 and bf16_available()


def embed_rms_norm(table: Tensor, ids: Tensor, eps: float) -> Tensor:
    """Rows of `table` [V, D] bfloat16 for `ids` [...] int64, each RMS-normalised without a weight: [..., D].

    Raises RuntimeError for an id outside the table.
    """
    rows: Tensor = torch.ops.hydra_heads.embed_rms_norm(table, ids, eps)
    return rows


def supports_sample_tokens(scores: Tensor) -> bool:
    """Whether `sample_tokens` can read `scores`."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and load_library()


def sample_tokens(scores: Tensor, keys: Tensor, drawing: Tensor) -> Tensor:
    """argmax(scores + Gumbel noise) for each line: token ids [M] int64.

    `scores`: [M, V] float32; `keys`: [M, 2] int32, the noise's key of each line; `drawing`: [M] bool, false for a line that
    takes its largest score without noise.
    """
    tokens: Tensor = torch.ops.hydra_heads.sample_tokens(scores, keys, drawing)
    return tokens


class NativeDecoder(Protocol):
    """Decoder layers in C++; see `Decoder` in `decoder.h`."""

    def add(self, norms: Sequence[Tensor | None], matrices: Sequence[Matrix], layouts: Sequence[MatrixLayout],
            group: int) -> None:
        """Append a layer. `norms`: of the layer's input, its MLP's input, query heads, key heads."""

    def run(self, residual: Tensor, keys: Tensor, values: Tensor, first: int, slots: Tensor, kv_len: int, cos: Tensor,
            sin: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        """Run all layers. `residual` [M, D] float32 is changed in place; returns the last layer's output [M, D], which the
        caller adds to it."""

    def run_tapped(self, residual: Tensor, keys: Tensor, values: Tensor, first: int, slots: Tensor, kv_len: int, cos: Tensor,
                   sin: Tensor, mask: Tensor | None, counts: Tensor | None, taps: Sequence[int], tapped: Tensor) -> Tensor:
        """`run` that writes what enters the layers `taps` to `tapped` [len(taps), M, D] float32."""


class NativeHead(Protocol):
    """A draft head in C++; see `DraftHead` in `draft_head.h`."""

    def add(self, matrices: Sequence[Matrix], layouts: Sequence[MatrixLayout], widens: bool, group: int) -> None:
        """Append a block of one or two matrices. `widens`: its input is wider than its output."""

    def end(self, matrix: Matrix, layout: MatrixLayout, group: int) -> None:
        """Set the vocabulary projection."""

    def logits(self, features: Tensor, path: Tensor) -> Tensor:
        """`features` [B, D], `path` [B, W, k, D]: logits [B, W, Vd] float32."""

    def top_k(self, features: Tensor, path: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest logits of each path, in order: indices [B, W, count] int64, probabilities float32."""


def supports_decoder(device: torch.device, norm_dtype: torch.dtype, head_width: int) -> bool:
    """Whether `make_decoder` can be called for layers on `device` whose norms are in `norm_dtype` (float32 alone)."""
    return device.type == "cpu" and norm_dtype == torch.float32 and head_width <= MAX_HEAD_WIDTH and load_library()


def make_decoder(heads: int, kv_heads: int, head_width: int, eps: float, head_eps: float) -> NativeDecoder:
    """A decoder without layers. `eps`, `head_eps`: of the layers' norms and of the query and key heads' norms."""
    made: Any = torch.classes.hydra_heads.Decoder(heads, kv_heads, head_width, eps, head_eps)
    decoder: NativeDecoder = made
    return decoder


def supports_head(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `make_head` can be called for matrices of `dtype` on `device`."""
    return device.type == "cpu" and dtype == torch.bfloat16 and load_library()


def make_head(norm: Tensor | None, eps: float, scale: float, softcap: float) -> NativeHead:
    """A draft head without blocks. `norm`: [D] float32 at its end; `scale` and `softcap` (0 for none): of its logits."""
    made: Any = torch.classes.hydra_heads.DraftHead(norm, eps, scale, softcap)
    head: NativeHead = made
    return head
