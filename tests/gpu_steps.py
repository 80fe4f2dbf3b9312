"""What a step costs on a CUDA device: run by hand where there is one, `python -m tests.gpu_steps FILE.json`.

Two bases of random weights in bf16, one shaped as Llama-2-7B and one as SmolLM2-135M: no files are needed, and a step's
time does not depend on the weights' values. Seconds of plain and tree steps with CUDA graphs and without, of drafting, and
of what the memory's bandwidth alone would allow.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hydra_core.base import Base
from hydra_core.base.fused import FusedDecoder
from hydra_core.base.graphs import step_forward
from hydra_core.base.load import _vocabulary_of
from hydra_core.base.vocabulary import BaseIdentity
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.tree.draft_tree import DraftTree
from pipelines.profiling import step_timing as step_costs
from pipelines.profiling.step_timing import draft_seconds, verify_seconds

SHAPES: dict[str, dict[str, Any]] = {
    "7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False),
    "smollm2": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True),
}
CONTEXT, REPEATS = 512, 15
POINTS = [(CONTEXT, 1, nodes) for nodes in (1, 8, 16, 32, 64)] + [(2048, 1, 1), (2048, 1, 64)] + [
    (CONTEXT, rows, nodes) for rows in (8, 32) for nodes in (1, 8, 16)]
TREES = {4: DraftTree(tuple((rank,) for rank in range(6)) + tuple((0, rank) for rank in range(5)) + ((1, 0), (1, 1), (2, 0))
                 + tuple((0, 0, rank) for rank in range(4)) + ((0, 1, 0), (1, 0, 0))
                 + tuple((0, 0, 0, rank) for rank in range(3)))}
DEVICE = torch.device("cuda")


def random_base(name: str) -> Base:
    """A base of the shape `name`, made on the device."""
    config = LlamaConfig(**SHAPES[name], torch_dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    vocabulary = _vocabulary_of(model, config, BaseIdentity(name, name, "bf16"), (2,))
    return Base(vocabulary, FusedDecoder(model, native=True), None, config.max_position_embeddings, DEVICE)


def random_heads(base: Base, kind: str) -> HeadDrafter:
    config = HeadsConfig.model_validate({"kind": kind, "num_heads": 4, "draft_vocab_size": 8192})
    vocab = DraftVocab.rank(torch.arange(base.vocab_size, 0, -1), 8192, base.stop_ids)
    return build_drafter(config, base.vocabulary, vocab).to(DEVICE, torch.bfloat16).eval().requires_grad_(False)


def bandwidth() -> float:
    """Bytes a second that the device reads and writes, copying 4 GiB."""
    source = torch.empty(2**32, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / statistics.median(seconds)


def bytes_of_step(base: Base) -> int:
    """Weights that every step reads: the layers' matrices and the vocabulary projection."""
    matrices = [matrix.weight for layer in base.decoder.layers for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return sum(_bytes(weight) for weight in (*matrices, base.vocabulary.head.weight))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure(name: str) -> dict[str, Any]:
    base = random_base(name)
    found: dict[str, Any] = {"weight_bytes": bytes_of_step(base)}
    for graphs in (True, False):
        step_costs.step_forward = partial(step_forward, graphs=graphs)
        times = verify_seconds(base, POINTS, REPEATS)
        found["verify, graphs" if graphs else "verify, no graphs"] = {
            f"{context} tokens, {rows} rows, {nodes} nodes": value for (context, rows, nodes), value in times.items()}
    for kind in ("medusa", "hydra", "hydra++"):
        heads = random_heads(base, kind)
        for what, trees in (("fixed", TREES), ("dynamic", None)):
            times = draft_seconds(base, heads, trees, (1, 8), CONTEXT, REPEATS)
            found[f"draft, {kind}, {what}"] = {f"{rows} rows, depth {depth}": value for (rows, depth), value in times.items()}
    return found


def main() -> None:
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bandwidth": bandwidth()}
    for name in sys.argv[2:] or SHAPES:
        report[name] = measure(name)
        report[name]["roofline"] = report[name]["weight_bytes"] / report["bandwidth"]
        torch.cuda.empty_cache()
        Path(sys.argv[1]).write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(json.dumps(report[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
