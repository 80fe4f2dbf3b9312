"""Published heads that cannot be imported exactly are refused in one line that names what is wrong, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hydra_core.base import Base, BaseVocabulary
from hydra_core.errors import InputError
from hydra_core.interop import import_official
from tests.official import hydra_config, hydra_tensors, medusa_config, medusa_tensors, write

LAYER = "prefix_embeding_layer.layers.0"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Case:
    """Files that a change spoils before they are written, or after."""

    def __init__(self, base: Base, group: str) -> None:
        prefix, medusa = group == "prefix", group == "medusa"
        made = medusa_tensors(base) if medusa else hydra_tensors(base, prefix=prefix)
        self.tensors: dict[str, Any] = dict(made)
        self.config = medusa_config() if medusa else hydra_config(prefix=prefix)
        self.name = "medusa_lm_head.pt" if medusa else "hydra_lm_head.pt"
        self.vocabulary: BaseVocabulary = base.vocabulary
        self.spoil: Callable[[Path, Path], object] = lambda folder, file: None


Change = Callable[[Case], object]


def says(**values: object) -> Change:
    """config.json says this."""
    return lambda case: case.config.update(values)


def holds(name: str, value: object) -> Change:
    return lambda case: case.tensors.update({name: value})


def holds_only(name: str) -> Change:
    """One tensor, in a folder whose config.json says nothing."""
    def change(case: Case) -> None:
        case.config, case.tensors = {}, {name: torch.ones(2)}
    return change


def lacks(start: str) -> Change:
    def change(case: Case) -> None:
        case.tensors = {name: value for name, value in case.tensors.items() if not name.startswith(start)}
    return change


def spoilt(spoil: Callable[[Path, Path], object], name: str = "hydra_lm_head.pt") -> Change:
    """`spoil` is called with the folder and the file of tensors."""
    def change(case: Case) -> None:
        case.name, case.spoil = name, spoil
    return change


def base_with(**settings: object) -> Change:
    def change(case: Case) -> None:
        values = {**case.vocabulary.config.to_dict(), "rope_parameters": ROPE, **settings}
        case.vocabulary = replace(case.vocabulary, config=SimpleNamespace(**values))
    return change


def cut(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


SAFE = "hydra_lm_head.safetensors"
BIAS = "hydra_mlp.0.1.linear.bias"
CASES: dict[tuple[str, str], tuple[Change, str]] = {
    ("hydra", "missing"): (lacks("hydra_mlp.1.0.linear.bias"), "tensor hydra_mlp.1.0.linear.bias is missing"),
    ("hydra", "missing rows"): (lacks("hydra_lm_head.2.bias"), "tensor hydra_lm_head.2.bias is missing"),
    ("hydra", "stray"): (holds("x", torch.zeros(2)), r"unexpected tensor x \(1 in all\): config.json describes 3 heads of 2"),
    ("hydra", "more heads than said"): (says(hydra_num_heads=2), "unexpected tensor hydra_lm_head.2.bias"),
    ("hydra", "fewer heads than said"): (says(hydra_num_heads=4), "tensor hydra_mlp.3.0.linear.weight is missing"),
    ("hydra", "more blocks than said"): (says(hydra_num_layers=1), f"unexpected tensor {BIAS}"),
    ("hydra", "shape"): (holds(BIAS, torch.zeros(7)), rf"{BIAS} has shape \(7,\), not \(32,\)"),
    ("hydra", "grounded or not"): (says(grounded_heads=False), r"0.0.linear.weight has shape \(32, 64\), not \(32, 32\)"),
    ("hydra", "prefix or not"): (says(hydra_head_arch="prefix-mlp"), r"0.1.linear.weight has shape \(32, 32\), not \(32, 64\)"),
    ("hydra", "cross attention"): (says(hydra_head_arch="cross-attn"), "hydra_head_arch='cross-attn': no kind of heads here"),
    ("hydra", "earlier layer"): (says(hidden_state_offset=2), "hidden_state_offset=2: these heads read an earlier layer"),
    ("hydra", "ungrounded prefix"): (says(hydra_head_arch="prefix-mlp", grounded_heads=False), "which no kind here does"),
    ("hydra", "not a number"): (says(hydra_num_heads="3"), "hydra_num_heads must be a whole number of at least 1, got '3'"),
    ("hydra", "not a list"): (says(hydra_head_arch=["mlp"]), r"hydra_head_arch=\['mlp'\]: no kind"),
    ("hydra", "no layers"): (says(hydra_num_layers=0), "hydra_num_layers must be a whole number of at least 1, got 0"),
    ("hydra", "a billion layers"): (says(hydra_num_layers=10**9), "describes 3 heads of 1000000000 blocks, and hydra_lm_head.pt"),
    ("hydra", "not a flag"): (says(grounded_heads=1), "grounded_heads must be true or false, got 1"),
    ("hydra", "too many heads"): (says(hydra_num_heads=17), "17 heads are more than the 16"),
    ("hydra", "another vocabulary"): (holds("hydra_lm_head.0.weight", torch.zeros(300, 32)),
                                      r"hydra_lm_head.0.weight has shape \(300, 32\), and base .* wants \(288, 32\)"),
    ("hydra", "another base"): (holds("input_embed_fn.weight", torch.ones(288, 32)),
                                "the embeddings of these heads' base are not those of base .* config.json names a/base"),
    ("hydra", "integers"): (holds(BIAS, torch.zeros(32, dtype=torch.int64)), "is of torch.int64"),
    ("hydra", "float64"): (holds(BIAS, torch.zeros(32, dtype=torch.float64)), "is of torch.float64"),
    ("hydra", "sparse"): (holds(BIAS, torch.ones(32).to_sparse()), "torch.sparse_coo"),
    ("hydra", "a scalar"): (holds("hydra_lm_head.0.weight", torch.tensor(1.0)), r"has shape \(\), not \(288, 32\)"),
    ("hydra", "not finite"): (holds(BIAS, torch.full((32,), float("nan"))), f"{BIAS} holds a number that is not finite"),
    ("hydra", "other things"): (holds("step", 3), "step is a int, not a tensor"),
    ("hydra", "nothing"): (lacks(""), "is not a map of names to tensors"),
    ("hydra", "truncated"): (spoilt(cut), "hydra_lm_head.pt: is truncated"),
    ("hydra", "truncated safetensors"): (spoilt(cut, SAFE), "hydra_lm_head.safetensors: is truncated"),
    ("hydra", "the other format"): (spoilt(lambda folder, file: file.rename(folder / SAFE)), "is truncated, or not what its"),
    ("hydra", "empty"): (spoilt(lambda folder, file: file.write_bytes(b"")), "is truncated"),
    ("hydra", "no config"): (spoilt(lambda folder, file: (folder / "config.json").unlink()), "config.json: is missing: it says"),
    ("hydra", "no JSON"): (spoilt(lambda folder, file: (folder / "config.json").write_text("{")), "json: is not valid JSON"),
    ("hydra", "no object"): (spoilt(lambda folder, file: (folder / "config.json").write_text("[]")), "must be a JSON object"),
    ("hydra", "no heads"): (spoilt(lambda folder, file: file.rename(folder / "x.pt")), "holds no published heads"),
    ("hydra", "two files"): (spoilt(lambda folder, file: (folder / SAFE).write_bytes(b"x")), "name one of the files"),
    ("hydra", "vLLM's names"): (holds_only("blocks.0.layers.0.weight"), "holds Medusa heads as vLLM names them"),
    ("hydra", "a whole model"): (holds_only("model.norm.weight"), "holds a whole model with its heads"),
    ("hydra", "EAGLE"): (holds_only("fc.weight"), "holds EAGLE's layer"),
    ("hydra", "unknown"): (holds_only("x"), "no heads of a known kind"),
    ("prefix", "missing"): (lacks("prefix_embeding_layer.norm.weight"), "prefix_embeding_layer.norm.weight is missing"),
    ("prefix", "a bias"): (holds(f"{LAYER}.self_attn.q_proj.bias", torch.zeros(32)), "unexpected tensor .*q_proj.bias"),
    ("prefix", "two layers"): (holds("prefix_embeding_layer.layers.1.x", torch.zeros(32)), "unexpected tensor .*layers.1.x"),
    ("prefix", "heads of attention"): (holds(f"{LAYER}.self_attn.k_proj.weight", torch.zeros(32, 32)), r"not \(16, 32\)"),
    ("prefix", "said to have none"): (says(hydra_head_arch="mlp"), "hydra_mlp.0.0.linear.weight is missing"),
    ("prefix", "other frequencies"): (holds(f"{LAYER}.self_attn.rotary_emb.inv_freq", torch.ones(4)),
                                      "the prefix layer's rotary frequencies are not those of base"),
    ("prefix", "frequencies that nobody tells"): (base_with(rope_parameters={**ROPE, "rope_theta": 5e5}),
                                                  "has no tensor .*inv_freq, and rope_theta of base .* is 500000.0"),
    ("prefix", "activation"): (base_with(hidden_act="gelu"), r"its hidden_act \(gelu\) makes another layer"),
    ("prefix", "scaled positions"): (base_with(rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}),
                                     r"its rope_type \(linear\) makes another layer"),
    ("medusa", "missing"): (lacks("1.0.linear.bias"), "tensor 1.0.linear.bias is missing"),
    ("medusa", "rows of one head"): (lacks("2.1.weight"), "tensor 2.1.weight is missing"),
    ("medusa", "a gap"): (lacks("1."), "tensor 1.0.linear.weight is missing"),
    ("medusa", "fewer heads than said"): (says(medusa_num_heads=4), "tensor 3.0.linear.weight is missing"),
    ("medusa", "more blocks than said"): (says(medusa_num_layers=2), "tensor 0.1.linear.weight is missing"),
    ("medusa", "stray"): (holds("0.1.bias", torch.zeros(288)), "unexpected tensor 0.1.bias"),
    ("medusa", "another base"): (holds("0.1.weight", torch.zeros(288, 64)), r"\(288, 64\), and base .* wants \(288, 32\)"),
}


@pytest.mark.parametrize("which", CASES, ids=", ".join)
def test_refused_by_name(tiny_base: Base, tmp_path: Path, which: tuple[str, str]) -> None:
    change, told = CASES[which]
    case = Case(tiny_base, which[0])
    change(case)
    folder = write(tmp_path / "theirs", case.tensors, case.config, case.name)
    case.spoil(folder, folder / case.name)
    with pytest.raises(InputError, match=told) as refused:
        import_official(folder, tmp_path / "ours", case.vocabulary, {})
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_the_width_of_another_base(tiny_base: Base, tmp_path: Path) -> None:
    """Also where the heads end in the base's rows, and only their blocks show it."""
    tensors = {f"0.0.linear.{part}": torch.zeros(*[64] * (2 if part == "weight" else 1)) for part in ("weight", "bias")}
    folder = write(tmp_path / "theirs", tensors, medusa_config(heads=1), "medusa_lm_head.pt")
    with pytest.raises(InputError, match=r"0.0.linear.weight has shape \(64, 64\), and base .* wants \(32, 32\)"):
        import_official(folder, tmp_path / "ours", tiny_base.vocabulary, {})
