"""Packed matrices give the same products, and are dropped when the weights they were copied from change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hydra_core.base.linear import FrozenLinear, PackableLinear, packable
from hydra_core.base.vocabulary import VocabHead


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 7, 48), (130, 48), (1, 48)])
def test_products(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 48).to(dtype), torch.randn(96).to(dtype), torch.randn(shape).to(dtype)
    for wanted_bias in (None, bias):
        wanted = F.linear(x, weight, wanted_bias)
        linear = FrozenLinear.of(weight, wanted_bias)
        assert (linear.layout != "plain") == packable(weight) and not (linear.layout != "plain" and dtype == torch.float32)
        torch.testing.assert_close(linear(x), wanted, atol=0.02, rtol=0.02)
    head = VocabHead(weight, bias, scale=0.5, softcap=3.0)
    torch.testing.assert_close(head.for_decoding()(x), head(x), atol=0.02, rtol=0.02)


def test_a_packed_layer_never_outlives_its_weights() -> None:
    torch.manual_seed(0)
    layer = PackableLinear(48, 32).to(torch.bfloat16).eval()
    x = torch.randn(4, 48).bfloat16()
    before = layer.state_dict().keys()
    with torch.no_grad():
        layer.pack()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=0.02, rtol=0.02)
    assert layer.state_dict().keys() == before
    layer.train()
    with torch.no_grad():
        layer.weight.mul_(3.0)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=0.02, rtol=0.02)
    layer.pack()
    with torch.no_grad():
        layer.load_state_dict({"weight": layer.weight * 2.0, "bias": layer.bias * 2.0})
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=0.02, rtol=0.02)
        layer.pack()
        layer.to(torch.float32).weight.mul_(3.0)
        torch.testing.assert_close(layer(x.float()), F.linear(x.float(), layer.weight, layer.bias))
        layer.to(torch.bfloat16)
    layer.pack()
    loss = layer(x).float().sum()  # with gradients the plain layout is used
    loss.backward()
    assert layer.weight.grad is not None
