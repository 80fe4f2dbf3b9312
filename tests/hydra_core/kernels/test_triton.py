"""Triton's kernels against PyTorch's operators, on a CUDA device where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hydra_core.base import load_base
from hydra_core.base.fused import FusedDecoder
from hydra_core.decoding import Engine, naive_generate
from hydra_core.kernels.triton import MAX_WIDTH, reason_unavailable
from hydra_core.proposers import NgramDrafter
from hydra_core.sampling import Request
from tests.hydra_core.kernels.test_library import folder, steps  # noqa: F401
from tests.trained import random_prompts

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need a CUDA device")


def test_where_they_are_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert reason_unavailable(torch.device("cpu"), torch.bfloat16, 576, 64) == "device cpu"
    monkeypatch.setattr("hydra_core.kernels.triton.triton", None)
    assert reason_unavailable(cuda, torch.bfloat16, 576, 64) == "Triton is not installed"
    monkeypatch.setattr("hydra_core.kernels.triton.triton", object())
    assert reason_unavailable(cuda, torch.bfloat16, 576, 64) is None
    assert reason_unavailable(cuda, torch.float64, 576, 64) == "dtype torch.float64"
    assert reason_unavailable(cuda, torch.float32, 576, 80) == "width 576, head width 80"
    assert reason_unavailable(cuda, torch.float32, MAX_WIDTH + 1, 64) is not None


@needs_cuda
@pytest.mark.parametrize("rows", [1, 3])
def test_steps_are_the_same(folder: Path, rows: int) -> None:  # noqa: F811
    """Every fused family, prompts and trees: hidden states, keys and values."""
    ours, theirs = (load_base(str(folder), dtype="fp32", device="cuda", cache=folder.parent, native=native)
                    for native in (True, False))
    assert isinstance(ours.decoder, FusedDecoder) and ours.decoder.kernels and not theirs.decoder.kernels
    with torch.inference_mode():
        for mine, wanted in zip(steps(ours, rows), steps(theirs, rows), strict=True):
            torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=2e-3)


@needs_cuda
def test_bf16_is_as_close_to_the_truth(folder: Path) -> None:  # noqa: F811
    exact = load_base(str(folder), dtype="bf16", device="cuda", cache=folder.parent, widen=True)
    bases = [load_base(str(folder), dtype="bf16", device="cuda", cache=folder.parent, native=native) for native in (True, False)]
    with torch.inference_mode():
        wanted = steps(exact, 2)[0]
        ours, theirs = (float((steps(base, 2)[0] - wanted).norm() / wanted.norm()) for base in bases)
    assert ours < 1.3 * theirs + 1e-3


@needs_cuda
def test_answers_equal_naive(folder: Path) -> None:  # noqa: F811
    base = load_base(str(folder), dtype="fp32", device="cuda", cache=folder.parent)
    requests = [Request(str(i), prompt, 24, stop_ids=()) for i, prompt in enumerate(random_prompts(9, seed=4))]
    results = Engine(base, NgramDrafter(min_match=1), max_batch_size=4).generate(requests)
    for request, result in zip(requests, results, strict=True):
        assert result.token_ids == naive_generate(base, request).token_ids
