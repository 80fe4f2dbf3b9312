"""Packed 4-bit weights: the checkpoint's own codes, products within the stated bound, each row independent of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from hydra_core.base import Base, load_base, load_vocabulary, resolve_base
from hydra_core.base.int4 import MOST_ROWS, BlockedInt4Weight, Int4Weight, for_few_rows
from hydra_core.base.linear import FrozenLinear
from hydra_core.base.q4_1 import load_codes, unpack_blocks
from hydra_core.decoding import Engine, compare, naive_generate
from hydra_core.errors import InputError
from hydra_core.kernels import ops
from hydra_core.proposers import NgramDrafter
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from tests.gguf_file import write_gguf
from tests.trained import overfit_heads, random_prompts


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_base_dir, path, quantised=True)
    return str(path)


@pytest.fixture(scope="module")
def base(model: str, cache: Path) -> Base:
    return load_base(model, dtype="int4", cache=cache)


def random_blocks(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    return quantize(values, GGMLQuantizationType.Q4_1)


def test_codes_are_the_files() -> None:
    blocks = random_blocks(24, 96)
    matrix = unpack_blocks(blocks)
    assert int(matrix.codes.max()) == 15 and int(matrix.codes.min()) == 0
    assert torch.equal(matrix.dequantise(), torch.from_numpy(dequantize(blocks, GGMLQuantizationType.Q4_1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_stay_within_the_bound(dtype: torch.dtype) -> None:
    matrix = unpack_blocks(random_blocks(64, 96))
    exact = matrix.dequantise(torch.float64)
    identity = torch.eye(96, dtype=dtype)
    values = Int4Weight.of(matrix, dtype)(identity).double().T
    scale, minimum = matrix.scale.double(), matrix.minimum.double()
    bound = ((8 * scale.abs() + (minimum + 8 * scale).abs())[..., None] + exact.abs().unflatten(1, (-1, 32))) / 256
    error = (values - exact).abs().unflatten(1, (-1, 32))
    assert bool((error <= (bound if dtype == torch.bfloat16 else 1e-6)).all())
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = x.double() @ exact.T
    assert float((Int4Weight.of(matrix, dtype)(x).double() - wanted).abs().max()) < (0.15 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (192, 576)])
def test_a_row_does_not_depend_on_the_others(rows: int, columns: int) -> None:
    """Verifying a small tree rounds as plain decoding does: a row is the same to the last bit in any place, beside any others."""
    matrix = unpack_blocks(random_blocks(rows, columns))
    for weight in (Int4Weight.of(matrix), for_few_rows(matrix, torch.bfloat16)):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(weight.most, columns, generator=generator).bfloat16()
        alone = torch.cat([weight(row[None]) for row in x])
        for count in range(1, weight.most + 1):
            assert torch.equal(weight(x[:count]), alone[:count])
            order = torch.randperm(weight.most, generator=generator)[:count]
            assert torch.equal(weight(x[order]), alone[order])


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (192, 576), (576, 1536)])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 13, 40])
def test_our_own_products_are_exact_but_for_their_last_rounding(shape: tuple[int, int], count: int) -> None:
    """Codes, scale and minimum are the file's own, with negative scales too; with a bias and without."""
    if not ops.bf16_available():
        pytest.skip("this processor has neither AVX2 nor AVX-512, or its AMX tiles could not be compiled")
    matrix = unpack_blocks(random_blocks(*shape))
    weight = for_few_rows(matrix, torch.bfloat16)
    assert isinstance(weight, BlockedInt4Weight)
    x, bias = torch.randn(count, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
    exact = x.double() @ matrix.dequantise(torch.float64).T
    for ours, wanted in ((weight(x), exact), (ops.linear_int4(x, weight.packed, weight.scales, bias),
                                              exact + bias.double())):
        # half a step of bf16, and float32's own over the sum of sizes
        allowed = wanted.abs() / 256 + 1e-5 * (x.double().abs() @ matrix.dequantise(torch.float64).abs().T + 1)
        assert bool(((ours.double() - wanted).abs() <= allowed).all())


def test_few_and_many_rows_take_different_kernels() -> None:
    """With one row more than the packed copy's limit, all rows use the dense matrix and its bf16 rounding."""
    matrix = unpack_blocks(random_blocks(64, 96))
    layer = FrozenLinear.of(matrix.dequantise().bfloat16(), None, matrix)
    dense = FrozenLinear.of(matrix.dequantise().bfloat16())
    assert layer.few is not None
    most = layer.few.most
    x = torch.randn(most + 1, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(layer(x[:most]), layer.few(x[:most])) and torch.equal(layer(x), dense(x))
    assert not torch.equal(layer(x)[:most], layer.few(x[:most]))


def test_the_checkpoint_keeps_its_codes(model: str, base: Base, cache: Path) -> None:
    """Under transformers' names and row order (queries and keys are stored permuted in the file)."""
    folder = resolve_base(model, cache).folder
    codes = load_codes(folder)
    assert codes is not None and len(codes) == 7 * 2
    plain = load_base(model, dtype="fp32", cache=cache)
    assert base.identity.digest == plain.identity.digest and base.identity.weight_format == "int4"
    assert base.identity == load_vocabulary(model, dtype="int4", cache=cache).identity
    for rows in (MOST_ROWS, MOST_ROWS + 1, 16, 17, 60):  # few and many rows are multiplied by different kernels
        prompt = [list(range(5, 5 + rows))]
        ours, wanted = base.hidden_states(prompt)[0].float(), plain.hidden_states(prompt)[0]
        assert float((ours - wanted).norm() / wanted.norm()) < 0.03


def test_answers_are_the_naive_loops(model: str, base: Base, cache: Path) -> None:
    """Where rows use the same kernel (prompts the dense one, steps the packed one): token for token, or a near-tie."""
    prompts = [prompt for prompt in random_prompts(24, seed=1) if len(prompt) > MOST_ROWS][:8]
    heads = overfit_heads(load_base(model, dtype="fp32", cache=cache), "hydra", prompts[:4]).to(torch.bfloat16)
    heads.vocabulary, heads.rows = base.vocabulary, base.vocabulary.head.restrict(heads.draft_vocab.ids)
    exact = load_base(model, dtype="int4", cache=cache, widen=True)
    requests = [Request(str(i), prompt, 24) for i, prompt in enumerate(prompts)]
    wanted = [naive_generate(base, request) for request in requests]
    tree = TreeSet({1: DraftTree(((0,), (1,), (0, 0)))})
    for drafter, trees, batch in ((None, None, 1), (None, None, 8), (NgramDrafter(min_match=1), None, 1), (heads, tree, 1),
                                  (heads, tree, 3)):
        for result, reference in zip(Engine(base, drafter, trees, max_batch_size=batch).generate(requests), wanted, strict=True):
            verdict = compare(base, result.prompt_ids, reference.token_ids, result.token_ids, exact)
            assert verdict.verdict in ("identical", "near-tie"), verdict


def test_what_is_refused(model: str, tiny_base_dir: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"base.dtype=int4: .* is not stored in Q4_1"):
        load_base(str(tiny_base_dir), dtype="int4", cache=cache)
    with pytest.raises(InputError, match="fused decoder on a CPU"):
        load_base(model, dtype="int4", cache=cache, fused=False)
