"""Compiled steps against the same steps by PyTorch's operators, and machines that cannot compile them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_core.base import Base, load_base
from hydra_core.base.fused import FusedDecoder
from hydra_core.base.native import MOST_TOKENS
from hydra_core.decoding import Engine
from hydra_core.errors import InputError
from hydra_core.kernels import library, ops
from hydra_core.kernels.library import library_folder
from hydra_core.proposers import NgramDrafter
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree
from tests.conftest import ROOT
from tests.hydra_core.base.test_decoders import MODELS
from tests.tiny import make_tokenizer
from tests.trained import random_prompts

FUSED = [name for name, (_, _, decoder) in MODELS.items() if decoder is FusedDecoder]
TREE = DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0))).as_batch


@pytest.fixture(params=FUSED)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build, config, _ = MODELS[request.param]
    torch.manual_seed(5)
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def steps(base: Base, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts of different lengths in the last `rows` of a cache, then a tree: hidden states, keys and values."""
    prompts = [list(prompt) for prompt in random_prompts(rows, seed=8)]
    cache = base.allocate(rows + 1, 64)
    base.prefill(prompts, cache, (1, rows + 1))
    tokens = torch.randint(3, 259, (rows, TREE.size), generator=torch.Generator().manual_seed(1))
    return base.forward(tokens.to(base.device), cache, (1, rows + 1), TREE).float(), cache.keys.float(), cache.values.float()


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_are_the_same(folder: Path, rows: int) -> None:
    compiled = load_base(str(folder), dtype="fp32", cache=folder.parent)
    assert isinstance(compiled.decoder, FusedDecoder) and compiled.decoder.native is not None
    plain = load_base(str(folder), dtype="fp32", cache=folder.parent, native=False)
    assert plain.decoder.native is None
    for ours, theirs in zip(steps(compiled, rows), steps(plain, rows), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


def test_padding_nodes_are_not_computed(folder: Path) -> None:
    """Rows with different numbers of nodes against the whole tree for each: real nodes agree, nothing is written for others."""
    base = load_base(str(folder), dtype="fp32", cache=folder.parent)
    assert base.ragged and not load_base(str(folder), dtype="fp32", cache=folder.parent, native=False).ragged
    prompts = [list(prompt) for prompt in random_prompts(3, seed=8)]
    tokens = torch.randint(3, 259, (3, TREE.size), generator=torch.Generator().manual_seed(1))
    counts, made = torch.tensor([1, TREE.size, 3]), []
    real = torch.arange(TREE.size) < counts[:, None]
    for given in (None, counts):
        cache = base.allocate(3, 64)
        base.prefill(prompts, cache, (0, 3))
        before = cache.keys.clone()
        made.append(base.forward(tokens, cache, (0, 3), TREE, given)[real])
        own = cache.lengths[:, None] + torch.arange(TREE.size)
        fresh = (cache.keys != before).any(0).flatten(2).any(2)[torch.arange(3)[:, None], own]
        assert torch.equal(fresh, torch.ones_like(real) if given is None else real)
    torch.testing.assert_close(made[1], made[0], atol=2e-5, rtol=2e-4)


def test_bf16_is_as_close_to_exact_as_pytorchs_own(folder: Path) -> None:
    def made(dtype: str, **changes: Any) -> torch.Tensor:
        return steps(load_base(str(folder), dtype=dtype, cache=folder.parent, **changes), 3)[0]

    exact = made("fp32")
    ours, theirs = ((made("bf16", native=native) - exact).norm() / exact.norm() for native in (True, False))
    assert float(ours) < max(1.6 * float(theirs), 0.01) and float(ours) < 0.1


def test_long_chunks_go_through_pytorch(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    native = tiny_base.decoder.native

    class Counting:
        def run(self, *given: Any) -> torch.Tensor:
            asked.append(given[0].numel() // given[0].shape[-1])
            result: torch.Tensor = native.run(*given)
            return result

    monkeypatch.setattr(tiny_base.decoder, "native", Counting())
    for tokens in (MOST_TOKENS // 2, MOST_TOKENS // 2 + 1):
        tiny_base.hidden_states([[7] * tokens, [9] * tokens])
    assert asked == [MOST_TOKENS]


def test_without_a_compiler_answers_are_the_same(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    library.load_library.cache_clear()
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    base = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    assert base.decoder.native is None and "there is no C++ compiler" in caplog.text
    requests = [Request(str(i), prompt, 20) for i, prompt in enumerate(random_prompts(6, seed=2))]
    ours = Engine(base, NgramDrafter(min_match=1), max_batch_size=3).generate(requests)
    assert [r.token_ids for r in ours] == [r.token_ids for r in Engine(tiny_base, max_batch_size=3).generate(requests)]
    library.load_library.cache_clear()


def test_a_compiler_that_fails_is_logged_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                            caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "native.cpp:1: no such thing" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    assert not library.load_library() and not library.load_library()
    assert caplog.text.count("native.cpp:1: no such thing") == 1
    assert [path.suffix for path in library_folder().iterdir()] == [".lock"]  # no partial file
    library.load_library.cache_clear()


def test_instructions_are_limited_by_a_known_word(monkeypatch: pytest.MonkeyPatch) -> None:
    library.sources_digest.cache_clear()
    monkeypatch.delenv(library.LIMIT, raising=False)
    assert library.instruction_limit() is None
    digests = [library.sources_digest()]
    for word in library.LIMITS:
        library.sources_digest.cache_clear()
        monkeypatch.setenv(library.LIMIT, word)
        assert library.instruction_limit() == word
        digests.append(library.sources_digest())
    assert len(set(digests)) == 4  # step costs of one are not those of another
    monkeypatch.setenv(library.LIMIT, "sse")
    with pytest.raises(InputError, match=r"HYDRA_HEADS_INSTRUCTIONS=sse: must be one of avx512, avx2, avx, or unset"):
        library.instruction_limit()
    library.sources_digest.cache_clear()


def test_a_compiler_is_told_what_it_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An older compiler has no option against AMX, one for another processor none of these: neither makes such instructions."""
    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    compiler.write_text(f"""#!/bin/sh
echo "$*" >> {calls}
case "$*" in *amx*) echo "error: unrecognized command-line option" >&2; exit 1;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
exit 0
""")
    compiler.chmod(0o755)
    monkeypatch.setenv(library.LIMIT, "avx2")
    library.sources_digest.cache_clear()
    try:
        assert library._compiled(str(compiler), tmp_path / "libraries").exists()
    finally:
        library.sources_digest.cache_clear()
    made = next(line for line in calls.read_text().splitlines() if library.MAIN_SOURCE in line)
    assert "-mno-avx512f" in made and "-mno-avx512bf16" in made and "amx" not in made


HERE = (ops.instructions(), ops.amx_available())
"""What this processor's kernels are made of, and whether they use AMX tiles."""
WIDTHS = {"avx512": 2, "avx2": 1, "": 0}
FORM_TESTS = ("tests/hydra_core/kernels/test_matmul.py", "tests/hydra_core/kernels/test_library.py",
              "tests/hydra_core/base/test_int4.py", "tests/hydra_core/base/test_linear.py",
              "tests/hydra_core/heads/test_heads.py", "tests/hydra_core/sampling")
TELL = "from hydra_core.kernels import ops; print(repr(ops.instructions()), ops.amx_available(), ops.load_library())"


@pytest.mark.slow
@pytest.mark.parametrize(("word", "wanted"), [("avx512", ("avx512", False)), ("avx2", ("avx2", False)), ("avx", ("", False))])
def test_kernels_of_other_processors(word: str, wanted: tuple[str, bool], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms that this processor would not take: two processes that start together compile one once, and it is put through
    the same tests in a process of its own. The last form is compiled everywhere, and tested where it is not the usual one."""
    if word != "avx" and (wanted == HERE or WIDTHS[wanted[0]] > WIDTHS[HERE[0]]):
        pytest.skip("this processor takes this form anyway, or a narrower one")
    monkeypatch.setenv(library.LIMIT, word)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs = [subprocess.Popen([sys.executable, "-c", TELL], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        said, _ = run.communicate(timeout=600)
        assert run.returncode == 0 and said.split() == [repr(wanted[0]), str(wanted[1]), "True"]
    assert len([path for path in library_folder().iterdir() if path.suffix == ".so"]) == 1
    if wanted == HERE:
        return
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow",
                             *FORM_TESTS], cwd=ROOT, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert "passed" in tested.stdout.splitlines()[-1]
