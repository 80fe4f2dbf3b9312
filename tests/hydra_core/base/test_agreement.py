"""A base gives transformers' own logits, or is run in another way, or is refused: found by comparison, not by a list of names."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from dataclasses import replace
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
from hydra_core.base.vocabulary import VocabHead
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
    seen: list[torch.Tensor] = []
    errors = agreement._errors
    monkeypatch.setattr(agreement, "_errors", lambda *given: seen.append(errors(*given)) or seen[-1])
    for dtype, least in (("fp32", 1e-8), ("bf16", 1e-3), ("int4-lossy", 1e-3)):
        seen.clear()
        base = load_base(str(tiny_base_dir), dtype=dtype, cache=tmp_path)
        assert type(base.decoder) is FusedDecoder
        head, *parts = seen
        assert [len(part) for part in parts] == [4, 7, 4] and len(head) == 7
        assert head.max() < agreement.HEAD_ERROR[base.dtype] / 2
        assert least < max(part.max() for part in parts) < agreement.ERROR[base.dtype] / 2


def test_every_dtype_has_a_tolerance(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 too, which transformers gives a base quantised by AWQ on a GPU whatever is asked for; its rounding is within it."""
    dtypes = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert dtypes == set(agreement.HEAD_ERROR) == set(agreement.ERROR) == set(agreement.WORST)
    monkeypatch.setattr(loading, "compute_dtype", lambda dtype: torch.float16)
    seen: list[torch.Tensor] = []
    errors = agreement._errors
    monkeypatch.setattr(agreement, "_errors", lambda *given: seen.append(errors(*given)) or seen[-1])
    base = load_base(str(tiny_base_dir), dtype="bf16", cache=tmp_path)
    assert base.dtype == torch.float16 and 1e-4 < max(part.max() for part in seen[1:]) < agreement.ERROR[torch.float16] / 4
    assert seen[0].max() < agreement.HEAD_ERROR[torch.float16] / 2
    monkeypatch.setattr(loading, "look_around", lambda folder: Surroundings(scale=1.05))
    with pytest.raises(InputError, match="they differ by"):
        load_base(str(tiny_base_dir), dtype="bf16", cache=tmp_path)


def off_at(monkeypatch: pytest.MonkeyPatch, positions: dict[int, float]) -> None:
    """Moves the logits of some of the 15 positions that are compared, by a share of their size, in any direction."""
    logits, count = Base.logits, 0

    def moved(self: Base, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal count
        made = logits(self, hidden).clone()
        for place in range(len(made)):
            direction = torch.randn(made.shape[1], generator=torch.Generator().manual_seed(place))
            direction -= direction.mean()
            made[place] += direction / direction.norm() * made.norm(dim=-1).mean() * positions.get(count + place, 0.0)
        count += len(made)
        return made

    monkeypatch.setattr(Base, "logits", moved)


@pytest.mark.parametrize(("positions", "right"), [
    ({}, True), ({0: 0.5}, True), ({6: 0.6, 9: 0.4, 14: 0.5}, True),     # rounding of a deep base, uneven as it is
    ({2: 1.4}, False), ({14: 1.0}, False),                               # one node sees what it should not
    ({13: 0.5, 14: 0.5}, False), ({0: 0.4, 1: 0.4}, False),              # half of a part
    ({place: 0.4 for place in range(4, 8)}, False)])
def test_rounding_is_uneven_and_a_wrong_decoder_is_not(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       positions: dict[int, float], right: bool) -> None:
    """In 16 bits: prompt (0 to 3), a whole path (4 to 10) and a tree (11 to 14)."""
    base, reference = pair_of(tiny_base_dir, tmp_path, "bf16")
    off_at(monkeypatch, positions)
    found = agreement.why_different(base, reference)
    assert (found is None) is right, found


@pytest.mark.parametrize("place", [0, 3, 10, 14])
def test_in_fp32_every_position_counts(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    base, reference = pair_of(tiny_base_dir, tmp_path, "fp32")
    assert agreement.why_different(base, reference) is None
    off_at(monkeypatch, {place: 0.01})
    found = agreement.why_different(base, reference)
    assert found is not None and found.startswith("logits differ by 0.0%, at the worst position by ")


def pair_of(folder: Path, cache: Path, dtype: str) -> tuple[Base, agreement.Reference]:
    """A base that is right, and what transformers makes of the same weights."""
    base = load_base(str(folder), dtype=dtype, cache=cache)
    return base, agreement.reference_of(AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype), "tiny")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("factor", [0.5, 0.7, 1.4, 2.0])
def test_a_wrong_scale_of_the_whole_forward_is_refused(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       dtype: str, factor: float) -> None:
    """It is off at every position, whatever rounding does."""
    base, reference = pair_of(tiny_base_dir, tmp_path, dtype)
    assert agreement.why_different(base, reference) is None
    logits = Base.logits
    monkeypatch.setattr(Base, "logits", lambda self, hidden: logits(self, hidden) * factor)
    found = agreement.why_different(base, reference)
    told = re.match(r"logits differ by ([\d.]+)%", found or "")
    assert told is not None and float(told[1]) == pytest.approx(abs(factor - 1) * 100, rel=0.1)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_missing_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """By the head alone and, were that not there, by the whole forward."""
    kind, settings, *_ = MODELS["capped"]
    folder = save(tmp_path / "capped", kind, settings)
    around = look_around(folder)
    monkeypatch.setattr(loading, "look_around", lambda folder: replace(around, softcap=None))
    with pytest.raises(InputError, match="its logits are not its hidden states times its vocabulary matrix"):
        load(folder, dtype=dtype)
    monkeypatch.setattr(loading, "check_head", lambda *_: None)
    with pytest.raises(InputError, match="no decoder of this engine computes what transformers' own forward does"):
        load(folder, dtype=dtype)


OF_THE_MACHINE = [MemoryError("no more"), InputError("base.model=x: one line"), torch.OutOfMemoryError("CUDA out of memory"),
                  torch.AcceleratorError("a device that fails"),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
                  RuntimeError("CUDA error: an illegal memory access was encountered")]


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=lambda error: str(error)[:12])
@pytest.mark.parametrize("place", ["forward", "reference", "head"])
def test_what_the_machine_is_to_blame_for_is_no_disagreement(tiny_base_dir: Path, tmp_path: Path, error: Exception, place: str,
                                                             monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
                                                             ) -> None:
    """The next decoder needs more memory still, and "not supported" would send a user away from a model that is."""
    from transformers import LlamaForCausalLM

    def fail(*_given: Any, **_named: Any) -> Any:
        raise error

    where = {"forward": (FusedDecoder, "__call__"), "reference": (LlamaForCausalLM, "forward"), "head": (VocabHead, "__call__")}
    monkeypatch.setattr(*where[place], fail)
    with pytest.raises(type(error)) as caught:
        load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    assert caught.value is error and "does not compute" not in caplog.text


def test_one_copy_of_the_weights_is_in_memory(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the fused decoder is rejected, its layers are freed before the weights are read again."""
    made: list[weakref.ref[Any]] = []
    take, read = FusedDecoder.__init__, loading._load_weights

    def keep(self: Any, *given: Any) -> None:
        take(self, *given)
        self.embedding = self.embedding * 1.5
        made.append(weakref.ref(self))

    def load_weights(wanted: Any) -> Any:
        assert [one for one in made if one() is not None] == []
        return read(wanted)

    monkeypatch.setattr(FusedDecoder, "__init__", keep)
    monkeypatch.setattr(loading, "_load_weights", load_weights)
    base = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    assert type(base.decoder) is TransformersDecoder and len(made) == 1


@pytest.mark.parametrize("limit", [None, 60])
def test_local_attention_past_its_window(tmp_path: Path, limit: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-Neo masks by slots of the cache: past the window short rows beside a long one, and siblings, saw too little."""
    folder = save(tmp_path / "neo", "gpt_neo", dict(vocab_size=288, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                                                    attention_types=[[["global", "local"], 1]], max_position_embeddings=128,
                                                    initializer_range=0.35, bos_token_id=1, eos_token_id=2))
    base = load(folder, context_limit=limit)
    assert type(base.decoder) is SequentialDecoder and "a mask of its own that counts slots of the cache" in caplog.text
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    requests = [Request(str(size), tuple(9 + i % 3 for i in range(size)), 12, stop_ids=()) for size in (3, 40)]
    results = Engine(base, NgramDrafter(min_match=1), max_batch_size=2).generate(requests)
    for request, result in zip(requests, results, strict=True):
        wanted = model.generate(torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=12, eos_token_id=None,
                                pad_token_id=2)[0, len(request.prompt_ids):].tolist()
        assert list(result.token_ids) == wanted


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
