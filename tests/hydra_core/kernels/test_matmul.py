"""The bfloat16 kernels against the same computation in float64, on processors with the instruction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from hydra_core.base import native
from hydra_core.base.layer import LayerWeights
from hydra_core.base.linear import FrozenLinear
from hydra_core.base.vocabulary import VocabHead, argmax
from hydra_core.kernels import ops

pytestmark = pytest.mark.skipif(not ops.instructions(),
                                reason="this processor has no bf16 dot product in AVX-512")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(32, 2), (96, 48), (960, 576), (64, 1536)])
@pytest.mark.parametrize("rows", [1, 2, 5, 11, 12, 13, 16, 25, 300, 600])
def test_products(shape: tuple[int, int], rows: int, threads: int) -> None:
    """As close as bf16 allows, with a bias and without; a row is the same to the last bit whatever rows go with it."""
    generator = torch.Generator().manual_seed(rows)
    weight, bias, x = (torch.randn(size, generator=generator).bfloat16() for size in (shape, shape[:1], (rows, shape[1])))
    packed = ops.pack_weight(weight)
    for added in (None, bias):
        ours = ops.linear(x, packed, added)
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        assert float((ours.double() - exact).abs().max()) <= float(exact.abs().max()) / 256 + 1e-2
        assert float((ours.double() - exact).norm() / exact.norm()) < 0.003
        alone = torch.cat([ops.linear(x[i:i + 1], packed, added) for i in range(0, rows, 7)])
        assert torch.equal(alone, ours[::7])


@pytest.mark.parametrize("rows", [1, 3, 12, 13, 40])
def test_argmax_equals_that_of_the_products(rows: int, threads: int) -> None:
    """The first among equals; small integers make many equal products."""
    generator = torch.Generator().manual_seed(rows)
    weight, bias = (torch.randint(-2, 3, shape, generator=generator).bfloat16() for shape in ((3200, 48), (3200,)))
    fine = torch.randn(3200, 48, generator=generator).bfloat16()
    x = torch.randint(-1, 2, (rows, 48), generator=generator).bfloat16()
    for matrix, added in ((weight, None), (weight, bias), (fine, None)):
        packed = ops.pack_weight(matrix)
        products = ops.linear(x, packed, added)
        assert torch.equal(ops.linear_argmax(x, packed, added), argmax(products.float()))
        head = VocabHead(matrix, added).for_decoding()
        assert torch.equal(head.argmax(x[None]), argmax(head(x[None])))


@pytest.mark.parametrize("width", [48, 576])
def test_normalised_embeddings(width: int) -> None:
    table, ids = (torch.randn(40, width) * 0.1).bfloat16(), torch.tensor([[3, 39], [0, 3]])
    ours = ops.embed_rms_norm(table, ids, 1e-5)
    exact = F.rms_norm(table[ids].double(), (width,), eps=1e-5)
    assert ours.shape == exact.shape and float((ours.double() - exact).norm() / exact.norm()) < 0.003
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        ops.embed_rms_norm(table, torch.tensor([40]), 1e-5)


def test_decoding_uses_these_layouts() -> None:
    if not ops.bf16_available():
        pytest.skip("the AMX tiles could not be compiled here")
    assert FrozenLinear.of(torch.randn(64, 48).bfloat16()).layout == "blocked"
    others = "onednn" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "plain"
    assert FrozenLinear.of(torch.randn(40, 48).bfloat16()).layout == others
    assert FrozenLinear.of(torch.randn(64, 48)).layout == "plain"


def layer(heads: int, kv_heads: int, width: int, hidden: int, inner: int) -> LayerWeights:
    torch.manual_seed(heads + width)

    def matrix(out: int, given: int) -> FrozenLinear:
        return FrozenLinear(torch.randn(out, given).mul(given ** -0.5).bfloat16(), None)

    return LayerWeights(torch.rand(hidden) + 0.5, matrix((heads + 2 * kv_heads) * width, hidden), None,
                        matrix(hidden, heads * width), torch.rand(hidden) + 0.5, matrix(2 * inner, hidden), matrix(hidden, inner))


@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 32), (8, 1, 128), (6, 2, 96)])
@pytest.mark.parametrize(("batch", "nodes", "kv_len"),
                         [(1, 1, 1), (1, 1, 40), (1, 5, 17), (2, 16, 64), (3, 7, 129), (1, 33, 700)])
@torch.inference_mode()
def test_a_layer_is_the_formula(shape: tuple[int, int, int], batch: int, nodes: int, kv_len: int, threads: int) -> None:
    """Attention with a mask and the gated MLP, for rows of different lengths in the middle of a cache, against float64."""
    if nodes > kv_len:
        pytest.skip("no room for the nodes")
    heads, kv_heads, width = shape
    hidden, inner, groups = 64, 80, heads // kv_heads
    weights = layer(heads, kv_heads, width, hidden, inner)
    compiled = native.native_decoder([weights], heads, kv_heads, width, 1e-5)
    keys, values = (torch.randn(1, batch + 2, kv_len + 3, kv_heads, width).bfloat16() for _ in range(2))
    residual = torch.randn(batch, nodes, hidden)
    lengths = torch.tensor([(kv_len - nodes) // (row + 1) for row in range(batch)])  # the first row fills the kv_len
    slots = lengths[:, None] + torch.arange(nodes)
    cos, sin = torch.ones(batch, nodes, 1, width).bfloat16(), torch.zeros(batch, nodes, 1, width).bfloat16()
    seen = torch.rand(batch, 1, nodes, kv_len) < 0.6
    seen[..., 0] = True
    seen &= torch.arange(kv_len) < (lengths + nodes)[:, None, None, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).bfloat16()
    ours = residual.clone()
    added = compiled.run(ours, keys, values, 1, slots, kv_len, cos, sin, mask, None)
    ours = ours + added.view_as(ours)

    def product(x: torch.Tensor, matrix: FrozenLinear) -> torch.Tensor:
        return F.linear(x, matrix.weight.double())

    exact = residual.double()
    normed = F.rms_norm(exact, (hidden,), weights.input_norm.double(), 1e-5)
    split = product(normed, weights.qkv).view(batch, nodes, heads + 2 * kv_heads, width)
    stored_keys, stored_values = keys[0, 1:batch + 1, :kv_len].double(), values[0, 1:batch + 1, :kv_len].double()
    queries = split[:, :, :heads].transpose(1, 2)
    looked = [store.transpose(1, 2).repeat_interleave(groups, 1) for store in (stored_keys, stored_values)]
    mixed = F.scaled_dot_product_attention(queries, *looked, attn_mask=mask.double()).transpose(1, 2).flatten(2)
    exact = exact + product(mixed, weights.output)
    normed = F.rms_norm(exact, (hidden,), weights.mlp_norm.double(), 1e-5)
    gate, up = product(normed, weights.gate_up).chunk(2, -1)
    exact = exact + product(F.silu(gate) * up, weights.down)
    assert float((ours.double() - exact).norm() / exact.norm()) < 0.01
    here = torch.arange(batch)[:, None]
    written = keys[0, 1:batch + 1][here, slots].double()
    torch.testing.assert_close(written, split[:, :, heads:heads + kv_heads], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 7, 3], [0, 19, 1], [12, 1, 19]])
@torch.inference_mode()
def test_ragged_rows_equal_rows_computed_alone(counts: list[int], threads: int) -> None:
    """A step of rows with `counts` nodes, without padding: each row is the same to the last bit as when it is computed alone."""
    heads, kv_heads, width, hidden, batch, nodes, kv_len = 9, 3, 64, 64, 3, 19, 90
    compiled = native.native_decoder([layer(heads, kv_heads, width, hidden, 80)] * 2, heads, kv_heads, width, 1e-5)
    keys, values = (torch.randn(2, batch, kv_len, kv_heads, width).bfloat16() for _ in range(2))
    residual, angles = torch.randn(batch, nodes, hidden), torch.rand(batch, nodes, 1, width)
    slots = torch.tensor([[40], [71], [3]]) + torch.arange(nodes)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    later = torch.arange(kv_len) > slots[:, None, :, None]
    mask = torch.zeros(batch, 1, nodes, kv_len).masked_fill(later, float("-inf")).bfloat16()
    real = torch.arange(nodes) < torch.tensor(counts)[:, None]
    stores = keys.clone(), values.clone()
    together = residual[real]
    added = compiled.run(together, *stores, 0, slots, kv_len, cos, sin, mask, torch.tensor(counts))
    together = together + added
    for row, count in enumerate(counts):
        if not count:
            continue
        own = [store.clone() for store in (keys, values)]
        alone = residual[row:row + 1, :count].clone()
        here = slice(row, row + 1)
        added = compiled.run(alone, *own, row, slots[here, :count].contiguous(), kv_len, cos[here, :count].contiguous(),
                             sin[here, :count].contiguous(), mask[here, :, :count].contiguous(), None)
        alone = alone[0] + added
        assert torch.equal(together[torch.arange(batch).repeat_interleave(torch.tensor(counts)) == row], alone)
        assert all(torch.equal(store[:, row], mine[:, row]) for store, mine in zip(stores, own, strict=True))
    with pytest.raises(RuntimeError, match="20 nodes of 19"):
        compiled.run(residual, *stores, 0, slots, kv_len, cos, sin, mask, torch.tensor([20, 1, 1]))
