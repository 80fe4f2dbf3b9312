"""Every architecture that the fields allow can be built, starts as it should, decodes exactly and survives a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hydra_core.base import Base, load_base
from hydra_core.base.linear import packable
from hydra_core.decoding import Engine, naive_generate
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig
from hydra_core.heads import base as heads_module
from hydra_core.heads.checkpoint import load_checkpoint, save_checkpoint
from hydra_core.kernels.library import load_library
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from hydra_core.tree.batch import chain
from tests.trained import overfit_heads, random_heads, random_prompts

TREES = TreeSet({1: DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))})
PUBLISHED: dict[str, object] = {"num_blocks": 4, "dropout": 0.2, "normalise_embeddings": False, "final_norm": False}
FIELDS: dict[str, dict[str, object]] = {
    "default": {}, "gated": {"mlp": "gated"}, "raw embeddings": {"normalise_embeddings": False},
    "no norm": {"final_norm": False}, "as published": PUBLISHED,
    "bias of the skip": {"skip_bias": True, "num_blocks": 2}, "rows of its own": {"own_rows": True},
    "published in full": {**PUBLISHED, "skip_bias": True, "own_rows": True},
    "gated without norm": {"mlp": "gated", "num_blocks": 3, "final_norm": False, "normalise_embeddings": False}}
KINDS = ("medusa", "hydra", "hydra++")
RECURRENT: dict[str, dict[str, object]] = {
    "recurrent": {"recurrent": True}, "recurrent and gated": {"recurrent": True, "mlp": "gated", "num_blocks": 2}}
"""For the kinds that read tokens."""
MADE = [(kind, name) for kind in KINDS for name in (*FIELDS, *(RECURRENT if kind != "medusa" else ()))]
FIELDS |= RECURRENT
NEW = ("recurrent", "mlp", "normalise_embeddings", "final_norm", "hybrid_decay", "head_decay", "mask_lost", "skip_bias",
       "own_rows")


def test_one_head_for_every_depth_is_fed_with_what_it_made(tiny_base: Base) -> None:
    heads = random_heads(tiny_base, "hydra++", recurrent=True)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert len(heads.heads) == 1 and heads.num_heads == 3
    width = tiny_base.vocabulary.width
    features, path = torch.randn(4, width), heads.embed(torch.randint(3, 200, (4, 3)))
    state = features
    for depth in range(3):
        state = heads.heads[0](torch.cat((state, path[:, depth]), dim=-1))
        torch.testing.assert_close(heads.head_hidden(depth, features, path[:, :depth + 1]), state)
    with pytest.raises(ValueError, match="recurrent heads read the tokens drafted before them, which kind=medusa does not"):
        HeadsConfig(kind="medusa", recurrent=True)


def test_no_two_heads_or_blocks_share_a_matrix(tiny_base: Base) -> None:
    """In the official repository all blocks of a head are one and the same."""
    for fields in ({}, {"mlp": "gated"}):
        heads = random_heads(tiny_base, "hydra++", num_blocks=3, **fields)
        matrices = [parameter.data_ptr() for name, parameter in heads.named_parameters() if ".blocks." in name]
        assert len(set(matrices)) == len(matrices) >= 3 * heads.num_heads


@pytest.mark.parametrize(("kind", "name"), MADE)
def test_shapes(tiny_base: Base, kind: str, name: str) -> None:
    heads = random_heads(tiny_base, kind, draft_vocab_size=50, **FIELDS[name])
    width = tiny_base.vocabulary.width
    assert heads.weight.shape[0] == width
    for head in range(heads.num_heads):
        hidden = heads.head_hidden(head, torch.randn(2, 5, width), heads.embed(torch.randint(3, 200, (2, 5, head + 1))))
        assert hidden.shape == (2, 5, width) and heads.draft_logits(hidden).shape == (2, 5, 50)


def test_what_each_field_changes(tiny_base: Base) -> None:
    """Medusa's heads start as the identity, with or without a final norm; embeddings are scaled only when configured."""
    hidden, tokens = torch.randn(3, tiny_base.vocabulary.width), torch.tensor([5, 9, 70])
    for mlp in ("residual", "gated"):
        bare = random_heads(tiny_base, "medusa", mlp=mlp, final_norm=False, num_blocks=2)
        assert torch.equal(bare.head_hidden(0, hidden, hidden), hidden)
        assert not any("norm" in name for name in bare.state_dict())
        ended = random_heads(tiny_base, "medusa", mlp=mlp)
        norm = F.rms_norm(hidden, hidden.shape[-1:], tiny_base.vocabulary.norm_weight, tiny_base.vocabulary.norm_eps)
        torch.testing.assert_close(ended.head_hidden(0, hidden, hidden), norm)
    raw = F.embedding(tokens, tiny_base.vocabulary.embedding)
    assert torch.equal(random_heads(tiny_base, "hydra", normalise_embeddings=False).embed(tokens), raw)
    scaled = random_heads(tiny_base, "hydra").embed(tokens)
    torch.testing.assert_close(scaled.square().mean(-1).sqrt(), torch.ones(3), rtol=1e-3, atol=1e-3)


def test_gated_block_is_the_formula(tiny_base: Base) -> None:
    heads = random_heads(tiny_base, "hydra", mlp="gated", final_norm=False)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.2)
    values = heads.state_dict()
    x = torch.randn(4, 2 * tiny_base.vocabulary.width)
    first, second = values["heads.0.blocks.0.gate_up.weight"].chunk(2)
    wanted = x @ values["heads.0.blocks.0.skip.weight"].T + (F.silu(x @ first.T) * (x @ second.T)) @ values[
        "heads.0.blocks.0.down.weight"].T
    torch.testing.assert_close(heads.heads[0](x), wanted)


@pytest.mark.parametrize(("kind", "name"), [pair for pair in MADE if pair[1] != "default"])
def test_answers_equal_naive(tiny_base: Base, kind: str, name: str) -> None:
    """Fixed and dynamic tree; greedy and sampled; some drafts are accepted."""
    prompts = random_prompts(4, seed=1)
    heads = overfit_heads(tiny_base, kind, prompts, steps=60, **FIELDS[name])
    requests = [Request(f"r{i}", prompt, 24, temperature=(0.0, 0.9)[i // 4], seed=i) for i, prompt in enumerate(prompts * 2)]
    wanted = [naive_generate(tiny_base, request).token_ids for request in requests]
    choices: list[tuple[Drafter, TreeSet | None]] = [(heads, TREES), (AdaptiveDrafter(heads, NgramDrafter(min_match=1)), None)]
    for drafter, trees in choices:
        results = Engine(tiny_base, drafter, *([trees] if trees else []), max_batch_size=3).generate(requests)
        assert [result.token_ids for result in results] == wanted
        assert sum(result.accepted for result in results) > 0


@pytest.mark.parametrize("name", FIELDS)
def test_packed_weights_draft_alike(tiny_base: Base, name: str) -> None:
    """Packed weights give the same logits up to rounding."""
    heads = random_heads(tiny_base, "hydra++", **FIELDS[name])
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1)
    heads = heads.to(torch.bfloat16)
    if not packable(heads.weight):
        pytest.skip("this machine packs nothing")
    features = torch.randn(40, tiny_base.vocabulary.width).bfloat16()
    path = heads.embed(torch.randint(3, 200, (40, 2)))
    with torch.no_grad():
        plain = heads.head_hidden(1, features, path)
        heads.pack()
        packed = heads.head_hidden(1, features, path)
    assert float((packed - plain).norm() / plain.norm()) < 0.01


@pytest.fixture(scope="module")
def bf16_base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    base = load_base(str(tiny_base_dir), dtype="bf16", cache=tmp_path_factory.mktemp("cache"))
    if not packable(base.vocabulary.embedding) or not load_library():
        pytest.skip("this machine packs or compiles nothing")
    return base


def noisy(base: Base, kind: str, **fields: object) -> HeadDrafter:
    heads = random_heads(base, kind, **fields)  # type: ignore[arg-type]
    torch.manual_seed(3)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1)
    return heads.to(torch.bfloat16)


@pytest.mark.parametrize("ends", [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize(("kind", "name"), [pair for pair in MADE if pair[1] not in RECURRENT])
@torch.no_grad()
def test_compiled_heads_draft_as_written(bf16_base: Base, kind: str, name: str, ends: tuple[float, float | None],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits up to rounding for every architecture, and exactly the top k of them, in order."""
    monkeypatch.setattr(heads_module, "native_head", lambda *given: None)
    plain, compiled = (noisy(bf16_base, kind, draft_vocab_size=64, **FIELDS[name]) for _ in range(2))
    for heads in (plain, compiled):
        heads.rows = replace(heads.rows, scale=ends[0], softcap=ends[1])
    plain.pack()
    monkeypatch.undo()
    compiled.pack()
    assert plain.heads[0].compiled is None and compiled.heads[0].compiled is not None
    width = bf16_base.vocabulary.width
    for head, paths, batch in ((0, 1, 1), (1, 4, 2), (2, 3, 5)):
        features, tokens = torch.randn(batch, width).bfloat16(), torch.randint(3, 200, (batch, paths, head + 1))
        path = plain.embed(tokens)
        ours, wanted = (heads.candidate_logits(head, features, path) for heads in (compiled, plain))
        assert ours.shape == wanted.shape == (batch, paths, 64) and ours.dtype == torch.float32
        assert float((ours - wanted).norm() / wanted.norm()) < 0.02
        for count in (1, 6, 64, 100):
            indices, chances = compiled.candidates(head, features, path, count)
            best = ours.softmax(-1).topk(min(count, 64), dim=-1)
            torch.testing.assert_close(chances, best.values)
            torch.testing.assert_close(ours.softmax(-1).gather(2, indices), best.values)
            assert indices.sort(-1).values.diff(dim=-1).gt(0).all(), "no token twice"


@torch.no_grad()
def test_compiled_heads_are_dropped_with_their_weights(bf16_base: Base) -> None:
    heads = noisy(bf16_base, "hydra++")
    features, path = torch.randn(1, bf16_base.vocabulary.width).bfloat16(), heads.embed(torch.tensor([[[5]]]))
    heads.pack()
    before = heads.candidate_logits(0, features, path)
    heads.load_state_dict({name: tensor * 1.5 for name, tensor in heads.state_dict().items()})
    assert heads.heads[0].compiled is None and heads.prefix._packed is None
    heads.pack()
    assert not torch.equal(heads.candidate_logits(0, features, path), before)
    assert heads.train().heads[0].compiled is None and heads.prefix._packed is None


@torch.no_grad()
def test_a_compiled_prefix_layer_reads_as_written(bf16_base: Base) -> None:
    """Ragged rows, in pieces: the same features and the same keys and values up to rounding."""
    layers = [noisy(bf16_base, "hydra++").prefix for _ in range(2)]
    for layer in layers:
        layer.pack()
    assert layers[1]._packed is not None
    layers[1]._packed = None
    caches = [layer.allocate(3, 40) for layer in layers]
    for count in (7, 1, 3):
        hidden = torch.randn(3, count, bf16_base.vocabulary.width).bfloat16()
        ours, wanted = (layer.step(hidden, cache, cache.build_metadata((0, 3), chain(count)))
                        for layer, cache in zip(layers, caches, strict=True))
        assert float((ours - wanted).float().norm() / wanted.float().norm()) < 0.02
        for cache in caches:
            cache.lengths += torch.tensor([count, count, 1])
    torch.testing.assert_close(caches[0].keys[:, :, :5], caches[1].keys[:, :, :5], atol=0.03, rtol=0.03)
    torch.testing.assert_close(caches[0].values[:, :, :5], caches[1].values[:, :, :5], atol=0.03, rtol=0.03)


@torch.no_grad()
def test_a_compiled_prefix_layer_reads_no_more_than_is_there(bf16_base: Base) -> None:
    """Rows with different counts: the results of padded rows, and nothing is written past their counts."""
    layer = noisy(bf16_base, "hydra++").prefix
    layer.pack()
    counts, hidden = torch.tensor([1, 7, 3]), torch.randn(3, 7, bf16_base.vocabulary.width).bfloat16()
    real = torch.arange(7) < counts[:, None]
    padded, own = (layer.allocate(3, 40) for _ in range(2))
    wanted = layer.step(hidden, padded, padded.build_metadata((0, 3), chain(7)))
    ours = layer.step(hidden, own, own.build_metadata((0, 3), chain(7)), counts)
    torch.testing.assert_close(ours[real], wanted[real], atol=0.02, rtol=0.02)
    torch.testing.assert_close(own.keys[0, :, :7][real], padded.keys[0, :, :7][real], atol=0.02, rtol=0.02)
    assert not own.keys[0, :, :7][~real].any() and padded.keys[0, :, :7][~real].any()


@pytest.mark.parametrize(("kind", "name"), MADE)
def test_comes_back_from_disk(tiny_base: Base, tmp_path: Path, kind: str, name: str) -> None:
    fields = FIELDS[name] | {"loss": "hybrid", "hybrid_decay": 10.0, "head_decay": 0.8, "mask_lost": True}
    heads = random_heads(tiny_base, kind, draft_vocab_size=50, **fields)
    save_checkpoint(tmp_path / "h", heads, tiny_base.identity, TREES, {})
    loaded = load_checkpoint(tmp_path / "h", tiny_base.vocabulary).drafter
    assert loaded.config == heads.config and loaded.state_dict().keys() == heads.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in heads.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_older_than_the_fields_is_what_it_was(tiny_base: Base, tmp_path: Path, kind: str) -> None:
    heads = random_heads(tiny_base, kind)
    save_checkpoint(tmp_path / "h", heads, tiny_base.identity, TREES, {})
    path = tmp_path / "h" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for field in NEW:
        del values["heads"][field]
    path.write_text(json.dumps(values), encoding="utf-8")
    loaded = load_checkpoint(tmp_path / "h", tiny_base.vocabulary).drafter
    assert loaded.config == heads.config
    assert loaded.config.mlp == "residual" and loaded.config.normalise_embeddings and loaded.config.final_norm
    assert loaded.config.head_decay == 1.0 and not loaded.config.mask_lost


@pytest.mark.parametrize(("field", "value"), [("loss", "kl"), ("head_decay", 0.0), ("head_decay", 1.5), ("hybrid_decay", -1),
                                              ("mlp", "swiglu"), ("mask_lost", "maybe"), ("vocab_rank", 8)])
def test_nonsense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        HeadsConfig.model_validate({"kind": "hydra", field: value})


def test_only_data_does_without_the_teacher() -> None:
    assert {loss: HeadsConfig.model_validate({"kind": "hydra", "loss": loss}).reads_teacher
            for loss in ("auto", "data", "teacher", "acceptance", "hybrid")} == {
                "auto": False, "data": False, "teacher": True, "acceptance": True, "hybrid": True}
    assert HeadsConfig(kind="hydra++").reads_teacher


@torch.no_grad()
def test_training_drops_the_packed_vocabulary_rows(bf16_base: Base) -> None:
    """They are also what a trainer's evaluation reads: 4 bits there would be another model than the one that is trained."""
    heads = noisy(bf16_base, "hydra", draft_vocab_size=64)
    states = torch.randn(3, bf16_base.vocabulary.width).bfloat16()
    written = F.linear(states, heads.rows.weight).float()
    heads.pack()
    assert heads.rows.packed is None and not torch.equal(heads.draft_logits(states), written)
    again = noisy(bf16_base, "hydra", draft_vocab_size=64)
    for undone in (heads.train(), heads.eval(), again):
        assert torch.equal(undone.draft_logits(states), written)
        undone.pack()
        undone.load_state_dict(undone.state_dict())
        assert torch.equal(undone.draft_logits(states), written)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_draft_vocabularies_share_nothing_that_changes(bf16_base: Base, kind: str) -> None:
    """Heads that draft from two vocabularies at once, as two engines do: each drafts its own tokens, whichever was packed last,
    and both learn when one is trained."""
    heads = noisy(bf16_base, kind, draft_vocab_size=64)
    few = DraftVocab(torch.arange(200, 100, -1), bf16_base.vocab_size)  # other tokens, and more of them
    features, path = torch.randn(2, bf16_base.vocabulary.width).bfloat16(), heads.embed(torch.tensor([[[5]], [[9]]]))
    alone = []
    for vocab in (heads.draft_vocab, few):
        one = noisy(bf16_base, kind, draft_vocab_size=64).with_draft_vocab(vocab)
        one.pack()
        alone.append(one.candidate_logits(0, features, path))
    heads.pack()
    other = heads.with_draft_vocab(few)
    assert other.heads[0].compiled is None and heads.heads[0].compiled is not None
    other.pack()
    for made, wanted in zip((heads, other), alone, strict=True):
        assert torch.equal(made.candidate_logits(0, features, path), wanted)
    mine, theirs = (dict(one.named_parameters()) for one in (heads, other))
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)  # no weight is held twice
    modules = {id(module) for module in heads.modules()} & {id(module) for module in other.modules()}
    assert not modules and other.vocabulary is heads.vocabulary
    assert other.config.draft_vocab_size == 100 and heads.config.draft_vocab_size == 64
