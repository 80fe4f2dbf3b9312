"""Which weight formats keep a checkpoint's own values, quantising on request, and models that are quantised already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hydra_core.base import formats, formats_of, load_base, load_vocabulary
from hydra_core.base.fallback import TransformersDecoder
from hydra_core.base.formats import LOSSY, quantised_by
from hydra_core.base.int4 import MOST_ROWS, Int4Weight
from hydra_core.base.q4_1 import NAMES, quantise, unpack_blocks
from hydra_core.decoding import Engine, compare, naive_generate
from hydra_core.errors import InputError
from hydra_core.kernels.ops import INT4_GROUP
from hydra_core.proposers import NgramDrafter
from hydra_core.sampling import Request
from tests.gguf_file import write_gguf
from tests.tiny import save_tiny
from tests.trained import random_prompts


def stored_as(folder: Path, target: Path, dtype: torch.dtype, but: str = "none") -> str:
    """A copy of the model with all tensors in `dtype`, except those with `but` in their name, which stay in float32."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file({name: tensor if but in name else tensor.to(dtype) for name, tensor in tensors.items()},
              target / "model.safetensors", {"format": "pt"})
    return str(target)


def test_formats_that_hold_the_checkpoints_own_values(tiny_base_dir: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def found(model: str, device: str = "cpu") -> tuple[str, ...]:
        return formats_of(model, cache=tmp_path / "cache", device=device)

    assert found(str(tiny_base_dir)) == ("fp32",)
    assert found(stored_as(tiny_base_dir, tmp_path / "b", torch.bfloat16)) == ("bf16",)
    assert found(stored_as(tiny_base_dir, tmp_path / "h", torch.float16)) == ("fp32",)  # bf16 would round it
    assert found(stored_as(tiny_base_dir, tmp_path / "m", torch.bfloat16, "norm")) == ("fp32",)
    assert found(stored_as(tiny_base_dir, tmp_path / "r", torch.bfloat16, "inv_freq")) == ("bf16",)
    write_gguf(tiny_base_dir, tmp_path / "q.gguf", quantised=True)
    assert found(str(tmp_path / "q.gguf")) == ("bf16", "int4")
    assert found(str(tmp_path / "q.gguf"), "cuda") == ("bf16",)
    write_gguf(tiny_base_dir, tmp_path / "f.gguf")
    assert found(str(tmp_path / "f.gguf")) == ("fp32",)
    monkeypatch.setattr(formats, "kernel_missing", lambda: "torch 3 has no kernel")
    assert found(str(tmp_path / "q.gguf")) == ("bf16",)
    with pytest.raises(InputError, match=r"torch 3 has no kernel.*use bf16"):
        load_base(str(tmp_path / "q.gguf"), dtype="int4", cache=tmp_path / "cache")


def test_a_base_is_loaded_in_a_concrete_format(tiny_base_dir: Path, tmp_path: Path) -> None:
    for load in (load_base, load_vocabulary):
        with pytest.raises(InputError, match=r"base.dtype=auto: a base is loaded in one of bf16, fp32, int4, int4-lossy"):
            load(str(tiny_base_dir), dtype="auto", cache=tmp_path)


def test_every_value_comes_back_within_half_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) * torch.logspace(-4, 1, 64)[:, None]
    weight[3] += 40.0  # far from zero, and close together: a minimum that is rounded up would lose the least of them
    weight[4, :INT4_GROUP], weight[5] = 0.25, 0.0
    matrix = quantise(weight)
    assert matrix.codes.dtype == torch.uint8 and int(matrix.codes.max()) == 15
    error = (matrix.dequantise(torch.float64) - weight).abs().unflatten(1, (-1, INT4_GROUP))
    assert bool((error <= 0.5001 * matrix.scale.double()[..., None]).all())
    assert torch.equal(matrix.dequantise()[4, :INT4_GROUP], weight[4, :INT4_GROUP]) and not matrix.dequantise()[5].any()


def test_what_is_q4_1_already_comes_back() -> None:
    values = np.random.default_rng(1).normal(size=(48, 96)).astype(np.float32)
    stored = unpack_blocks(quantize(values, GGMLQuantizationType.Q4_1))
    again = quantise(stored.dequantise())
    for part in ("codes", "scale", "minimum"):
        assert torch.equal(getattr(again, part), getattr(stored, part)), part
    assert torch.equal(Int4Weight.of(again).scales, Int4Weight.of(stored).scales)


def test_a_lossy_base_is_named_so(tiny_base_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "hydra_core"):
        lossy = load_base(str(tiny_base_dir), dtype=LOSSY, cache=tmp_path)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 and "its answers differ from the model's own" in warnings[0]
    plain = load_base(str(tiny_base_dir), dtype="bf16", cache=tmp_path)
    assert lossy.identity.weight_format == LOSSY and lossy.identity.digest == plain.identity.digest
    assert lossy.identity != plain.identity
    assert lossy.identity == load_vocabulary(str(tiny_base_dir), dtype=LOSSY, cache=tmp_path).identity
    assert lossy.dtype == torch.bfloat16 and lossy.decoder.layers[0].down.few is not None
    # few rows, many rows and the float64 copy are one model: that of the codes
    model = LlamaForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    for layer in model.model.layers:
        for part in NAMES.values():
            weight = layer.get_submodule(part).weight
            weight.data.copy_(quantise(weight.detach()).dequantise())
    exact = load_base(str(tiny_base_dir), dtype=LOSSY, cache=tmp_path, widen=True)
    prompt = list(range(5, 45))
    with torch.inference_mode():
        wanted = model.model(torch.tensor([prompt])).last_hidden_state[0]
    torch.testing.assert_close(exact.hidden_states([prompt])[0].float(), wanted, atol=1e-4, rtol=1e-4)
    for rows in (MOST_ROWS, MOST_ROWS + 1, 40):
        ours, right = lossy.hidden_states([prompt[:rows]])[0].float(), wanted[:rows]
        assert float((ours - right).norm() / right.norm()) < 0.03
    unquantised = plain.hidden_states([prompt])[0].float()
    assert float((unquantised - wanted).norm() / wanted.norm()) > 0.03


def test_lossy_answers_are_the_naive_loops(tmp_path: Path) -> None:
    # calm: the usual tiny base amplifies rounding until one in sixty answers parts at more than a near-tie on some processors
    model = str(save_tiny(tmp_path / "calm", hidden_size=128, intermediate_size=256, initializer_range=0.08))
    base = load_base(model, dtype=LOSSY, cache=tmp_path)
    exact = load_base(model, dtype=LOSSY, cache=tmp_path, widen=True)
    prompts = [prompt for prompt in random_prompts(24, seed=1) if len(prompt) > MOST_ROWS][:8]
    requests = [Request(str(i), prompt, 24) for i, prompt in enumerate(prompts)]
    for batch in (1, 8):
        for result, request in zip(Engine(base, NgramDrafter(min_match=1), max_batch_size=batch).generate(requests), requests,
                                   strict=True):
            found = compare(base, request.prompt_ids, naive_generate(base, request).token_ids, result.token_ids, exact)
            assert found.verdict in ("identical", "near-tie"), found


def test_what_cannot_be_quantised(tiny_base_dir: Path, tmp_path: Path) -> None:
    write_gguf(tiny_base_dir, tmp_path / "q.gguf", quantised=True)
    odd = save_tiny(tmp_path / "odd", intermediate_size=72)
    for model, changes, words in ((str(tmp_path / "q.gguf"), {}, "stored in 4 bits already: use int4"),
                                  (str(tiny_base_dir), {"fused": False}, "fused decoder on a CPU .asked not to fuse"),
                                  (str(odd), {}, "mlp.gate_proj.weight is 72 x 32")):
        with pytest.raises(InputError, match=words) as caught:
            load_base(model, dtype=LOSSY, cache=tmp_path / "cache", **changes)
        assert "\n" not in str(caught.value)


def test_methods_by_name() -> None:
    class Settings:
        def __init__(self, found: Any) -> None:
            self.quantization_config = found

    class Gptq:
        quant_method = "gptq"

    assert quantised_by(Settings({"quant_method": "awq", "bits": 4})) == "awq" and quantised_by(Settings(Gptq())) == "gptq"
    assert quantised_by(Settings(None)) is None and quantised_by(object()) is None
    assert quantised_by(Settings({"bits": 4})) == "an unnamed method"


def test_a_quantised_model_runs_through_transformers(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    """A quantised model has modules of its own instead of matrices; here they are plain ones, since the methods need a GPU."""
    folder = shutil.copytree(tiny_base_dir, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}),
                                        encoding="utf-8")
    asked: dict[str, Any] = {}

    def load(found: Path, **settings: Any) -> Any:
        asked.update(settings)
        return LlamaForCausalLM.from_pretrained(tiny_base_dir, dtype=settings["dtype"], output_loading_info=True)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with caplog.at_level("WARNING", "hydra_core"):
        base = load_base(str(folder), dtype="fp32", cache=tmp_path)
    assert [record.message for record in caplog.records] == [
        "the base uses transformers' own forward, not the fused one (quantised by awq)"]
    assert type(base.decoder) is TransformersDecoder and asked["device_map"] == {"": torch.device("cpu")}
    request = Request("q", tuple(range(5, 25)), 16)
    wanted = naive_generate(load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path, fused=False), request).token_ids
    assert Engine(base, NgramDrafter(min_match=1)).generate([request])[0].token_ids == wanted
    assert formats_of(str(folder), cache=tmp_path, device="cuda") == ("bf16",)
    for changes, words in (({"widen": True}, "quantised by awq and cannot be computed in float64"),
                           ({"dtype": LOSSY}, "the model is quantised by awq")):
        with pytest.raises(InputError, match=words):
            load_base(str(folder), cache=tmp_path, **{"dtype": "fp32", **changes})

    def lacking(found: Path, **settings: Any) -> Any:
        raise ImportError("Loading an AWQ model requires\na package")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacking)
    with pytest.raises(InputError, match=r"quantised by awq, which transformers cannot run here \(Loading an AWQ model"):
        load_base(str(folder), dtype="bf16", cache=tmp_path)
