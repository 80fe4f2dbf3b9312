"""A base gives transformers' own logits, or is run in another way, or is refused: found by comparison, not by a list of names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hydra_core.base import Base, agreement, load_base, load_vocabulary
from hydra_core.base import load as loading
from hydra_core.base.fallback import TransformersDecoder
from hydra_core.base.fused import FusedDecoder
from hydra_core.base.probe import Surroundings, look_around
from hydra_core.base.sequential import SequentialDecoder
from hydra_core.decoding import Engine, naive_generate
from hydra_core.errors import InputError
from hydra_core.proposers import NgramDrafter
from hydra_core.sampling import Request
from tests.tiny import make_tokenizer
from tests.trained import random_heads, random_prompts

SMALL: dict[str, Any] = dict(vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.35, pad_token_id=2,
                             bos_token_id=1, eos_token_id=2)
WIDE = SMALL | {"head_dim": 8}
KINDS = ["sliding_attention", "full_attention"]
MIXER = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8)
MODELS: dict[str, tuple[str, dict[str, Any], type, float, float | None]] = {
    "scaled": ("granite", SMALL | dict(logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0,
                                       attention_multiplier=0.2), TransformersDecoder, 0.25, None),
    "scaled experts": ("granitemoe", WIDE | dict(logits_scaling=0.5, num_local_experts=4, num_experts_per_tok=2),
                       TransformersDecoder, 2.0, None),
    "scaled the other way": ("hyperclovax", SMALL | dict(logits_scaling=4.0), TransformersDecoder, 4.0, None),
    "scaled by another name": ("cohere", SMALL | dict(logit_scale=0.3), TransformersDecoder, 0.3, None),
    "multiplied": ("falcon_h1", WIDE | MIXER | dict(lm_head_multiplier=0.25), SequentialDecoder, 0.25, None),
    "capped": ("gemma2", WIDE | dict(final_logit_softcapping=2.5, layer_types=KINDS), TransformersDecoder, 1.0, 2.5),
    "capped in the class": ("nanochat", SMALL | dict(final_logit_softcapping=3.0), TransformersDecoder, 1.0, 3.0),
    "partly rotary": ("phi3", SMALL, TransformersDecoder, 1.0, None),
    "norms after the layers": ("olmo2", SMALL, TransformersDecoder, 1.0, None),
    "experts": ("mixtral", WIDE | dict(num_local_experts=4, sliding_window=None), TransformersDecoder, 1.0, None),
    "sinks": ("gpt_oss", WIDE | dict(num_local_experts=4), TransformersDecoder, 1.0, None),
    "layers that differ": ("gemma4_text", WIDE | dict(global_head_dim=16, hidden_size_per_layer_input=0, layer_types=KINDS,
                                                      vocab_size_per_layer_input=288), SequentialDecoder, 1.0, None),
}
"""Name -> model type, configuration, and what is right for it: decoder, scale and soft cap."""


def save(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if "lm_head" in name or "embed_tokens" in name:
                parameter.mul_(2)  # logits that a cap changes
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **changes: Any) -> Base:
    return load_base(str(folder), **{"dtype": "fp32", "cache": folder.parent / "cache", **changes})


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, type, float, float | None]:
    kind, settings, decoder, scale, softcap = MODELS[request.param]
    return save(tmp_path_factory.mktemp("model") / "saved", kind, settings), decoder, scale, softcap


@torch.inference_mode()
def test_logits_have_transformers_values(saved: tuple[Path, type, float, float | None]) -> None:
    """Not only the same order: samples, probabilities and what heads learn depend on the values."""
    folder, decoder, scale, softcap = saved
    base = load(folder)
    head = base.vocabulary.head
    assert type(base.decoder) is decoder
    assert head.scale == pytest.approx(scale, rel=1e-6) and head.softcap == (softcap and pytest.approx(softcap, rel=1e-6))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt in random_prompts(3, seed=4):
        wanted = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(base.logits(base.hidden_states([prompt])[0]), wanted, atol=2e-4, rtol=2e-4)


def test_a_trainers_ends_are_the_bases(saved: tuple[Path, type, float, float | None]) -> None:
    folder = saved[0]
    base, ends = load(folder), load_vocabulary(str(folder), dtype="fp32", cache=folder.parent / "cache")
    states = torch.randn(5, base.vocabulary.width)
    assert torch.equal(ends.head(states), base.logits(states)) and torch.equal(ends.embedding, base.vocabulary.embedding)
    assert torch.equal(ends.norm_weight, base.vocabulary.norm_weight)


@torch.inference_mode()
def test_heads_start_with_what_the_final_norm_multiplies_by(saved: tuple[Path, type, float, float | None]) -> None:
    """Some norms multiply by 1 + weight: an RMSNorm with that weight as it is would be another norm."""
    folder = saved[0]
    ends = load_vocabulary(str(folder), dtype="fp32", cache=folder.parent / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decoder = model.get_decoder()
    norm = next(getattr(decoder, name) for name in ("norm", "final_layernorm") if hasattr(decoder, name))
    states = torch.randn(4, ends.width)
    states -= states.mean(-1, keepdim=True)  # Cohere's norm subtracts it
    wanted = norm(states)
    ours = torch.nn.functional.rms_norm(states, (ends.width,), ends.norm_weight, ends.norm_eps)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_the_probe_and_the_configuration_agree_on_nothing_by_name(tmp_path: Path) -> None:
    """A class whose logits are another function is not guessed at: what comes out is the usual, which comparison then rejects."""
    folder = save(tmp_path / "one", "llama", SMALL)
    found = look_around(folder)
    assert (found.scale, found.softcap, found.norm_offset) == (1.0, None, 0.0)
    assert (found.embedding, found.norm, found.head) == ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert found.weights["model.layers.1.mlp.down_proj.weight"] == (32, 64) and len(found.weights) == 21
    (tmp_path / "no folder").mkdir()
    assert look_around(tmp_path / "no folder") == Surroundings()


def with_scaled_logits(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """transformers' Llama, as a later version might have it: logits with a factor that no configuration names."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self: Any, *given: Any, **named: Any) -> Any:
        output = forward(self, *given, **named)
        output.logits = output.logits * factor
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)


@pytest.mark.parametrize("factor", [4.0, 0.9])
def test_a_factor_that_no_configuration_names_is_applied(tiny_base_dir: Path, tmp_path: Path, factor: float,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    with_scaled_logits(monkeypatch, factor)
    for dtype in ("fp32", "bf16"):
        assert load_base(str(tiny_base_dir), dtype=dtype, cache=tmp_path).vocabulary.head.scale == pytest.approx(factor)
    states = torch.randn(3, 32)
    scaled = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    torch.testing.assert_close(scaled.logits(states), plain.logits(states) * factor)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int4-lossy"])
@pytest.mark.parametrize("wrong", [{"scale": 1.05}, {"scale": 0.25}, {"softcap": 3.0}])
def test_a_head_that_is_off_is_refused(tiny_base_dir: Path, tmp_path: Path, dtype: str, wrong: dict[str, float],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers would be right, samples and probabilities would not. 5 % is far more than any format rounds."""
    monkeypatch.setattr(loading, "look_around", lambda folder: Surroundings(**wrong))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"its logits are not its hidden states times its vocabulary matrix.* \(they differ by "
                                         r"\d+\.\d%\): this architecture is not supported") as caught:
        load_base(str(tiny_base_dir), dtype=dtype, cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_what_the_fused_decoder_computes_wrongly_runs_otherwise(tiny_base_dir: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    """Other embeddings, as of a family that multiplies them, and an error that only a tree shows."""
    right = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    request = Request("r", tuple(range(5, 25)), 12)
    wanted = naive_generate(right, request).token_ids
    take = FusedDecoder.__init__

    def spoiled(self: Any, *given: Any) -> None:
        take(self, *given)
        self.embedding = self.embedding * 1.5

    monkeypatch.setattr(FusedDecoder, "__init__", spoiled)
    base = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    assert type(base.decoder) is TransformersDecoder
    assert "FusedDecoder does not compute what transformers' own forward does (logits differ by" in caplog.text
    assert Engine(base, NgramDrafter(min_match=1)).generate([request])[0].token_ids == wanted
    monkeypatch.setattr(FusedDecoder, "__init__", take)

    from hydra_core.base.kv_cache import KVCache
    monkeypatch.setattr(KVCache, "_mask_by_row", lambda self, lengths, trees, kv_len: torch.zeros(
        len(lengths), 1, trees.size, kv_len, dtype=self.dtype))  # every node sees all others
    base = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    assert type(base.decoder) is SequentialDecoder and "decodes plainly" in caplog.text
    assert naive_generate(base, request).token_ids == wanted


def test_native_steps_that_are_wrong_are_not_used(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decoder goes on by PyTorch's operators."""
    native = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    if native.decoder.native is None:  # type: ignore[attr-defined]
        pytest.skip("there is no compiler here")
    monkeypatch.setattr("hydra_core.base.fused.run_natively", lambda decoder, hidden, *given: hidden)
    base = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    assert type(base.decoder) is FusedDecoder and base.decoder.native is None and not base.ragged
    prompt = list(range(9, 40))
    torch.testing.assert_close(base.hidden_states([prompt])[0], native_hidden(tiny_base_dir, tmp_path, prompt))


def native_hidden(folder: Path, cache: Path, prompt: list[int]) -> torch.Tensor:
    return load_base(str(folder), dtype="fp32", cache=cache, native=False).hidden_states([prompt])[0]


def test_what_no_decoder_computes_is_refused(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "why_different", lambda base, reference: "logits differ by 31.0%")
    with pytest.raises(InputError, match=r"no decoder of this engine computes what transformers' own forward does "
                                         r"\(logits differ by 31\.0%\): this architecture is not supported"):
        load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)


def test_damaged_weights_are_refused(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Not a number in one matrix: every answer was token 0."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_base_dir, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="its logits are not finite numbers: its weights are damaged"):
        load(folder)


def test_the_tolerance_of_a_format_is_above_its_rounding(tiny_base_dir: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is compared at load, by format: a check that nothing passes, or everything, is none."""
    seen: list[float] = []
    error = agreement._error
    monkeypatch.setattr(agreement, "_error", lambda *given: seen.append(error(*given)) or seen[-1])
    for dtype, least in (("fp32", 1e-8), ("bf16", 1e-3), ("int4-lossy", 1e-3)):
        base = load_base(str(tiny_base_dir), dtype=dtype, cache=tmp_path)
        assert type(base.decoder) is FusedDecoder
        assert least < seen[-1] < agreement.ERROR[base.dtype] / 2 and seen[-2] < agreement.HEAD_ERROR[base.dtype] / 2


@pytest.mark.parametrize(("window", "limit", "decoder"), [(128, None, FusedDecoder), (60, None, TransformersDecoder),
                                                          (60, 61, TransformersDecoder), (60, 60, FusedDecoder)])
def test_a_window_that_hides_nothing_is_none(tmp_path: Path, window: int, limit: int | None, decoder: type) -> None:
    folder = save(tmp_path / "mistral", "mistral", WIDE | {"sliding_window": window})
    base = load(folder, context_limit=limit)
    assert type(base.decoder) is decoder
    request = Request("long", tuple(range(5, 25)), 60, stop_ids=())
    wanted = naive_generate(load(folder, context_limit=limit, fused=False), request).token_ids
    assert Engine(base, NgramDrafter(min_match=1)).generate([request])[0].token_ids == wanted


@pytest.mark.parametrize(("limit", "decoder"), [(None, SequentialDecoder), (33, SequentialDecoder), (32, TransformersDecoder)])
def test_longrope_that_never_changes_holds_trees(tmp_path: Path, limit: int | None, decoder: type,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    """Its frequencies change for all rows once one is longer than 32 tokens; drafts past the limit do not count."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 32}
    folder = save(tmp_path / "phi3", "phi3", SMALL | {"rope_parameters": rope, "original_max_position_embeddings": 32})
    base = load(folder, context_limit=limit)
    assert type(base.decoder) is decoder
    assert ("base.context_limit=32 avoids that" in caplog.text) is (decoder is SequentialDecoder)
    request = Request("r", tuple([9, 8] * 10), 40, stop_ids=())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = Engine(base, NgramDrafter(min_match=1)).generate([request])[0]
    assert result.token_ids == naive_generate(base, request).token_ids
    if limit == 32:
        with torch.inference_mode():
            wanted = model.generate(torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=12, eos_token_id=None,
                                    pad_token_id=2)[0, 20:].tolist()
        assert list(result.token_ids) == wanted and result.drafted > 0


def test_a_trainer_refuses_what_a_base_refuses(tiny_base_dir: Path, tmp_path: Path) -> None:
    """A tensor that is missing or has another shape, in the same words, before anything is learned."""
    from safetensors.torch import load_file, save_file

    tensor = "model.layers.1.mlp.down_proj.weight"
    for number, value in enumerate((None, torch.zeros(32, 10))):
        folder = shutil.copytree(tiny_base_dir, tmp_path / str(number))
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(tensor)
        save_file(tensors | ({tensor: value} if value is not None else {}), folder / "model.safetensors",
                  metadata={"format": "pt"})
        told = []
        for door in (load_base, load_vocabulary):
            with pytest.raises(InputError, match=tensor) as caught:
                door(str(folder), dtype="fp32", cache=tmp_path)
            told.append(str(caught.value))
        assert told[0] == told[1]


def test_layers_that_differ_take_no_part_in_a_tree(tmp_path: Path) -> None:
    """Gemma 4's layers have other widths; the engine decodes plainly, and heads are not asked."""
    kind, settings, *_ = MODELS["layers that differ"]
    base = load(save(tmp_path / "gemma4", kind, settings))
    requests = [Request(f"r{i}", prompt, 8, stop_ids=()) for i, prompt in enumerate(random_prompts(4, seed=2))]
    results = Engine(base, random_heads(base, "medusa"), max_batch_size=2).generate(requests)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma4", dtype=torch.float32)
    for result, request in zip(results, requests, strict=True):
        wanted = model.generate(torch.tensor([request.prompt_ids]), max_new_tokens=8, do_sample=False, eos_token_id=None,
                                pad_token_id=0)
        assert result.token_ids == tuple(wanted[0, len(request.prompt_ids):].tolist())
    config = json.loads((tmp_path / "gemma4" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gemma4_text"
