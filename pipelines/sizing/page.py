"""The page of sizes: bases of 1B, 8B and 70B on 1, 8 and 32 GPUs, by the same formulas as `--plan`."""

from __future__ import annotations

import textwrap
from functools import cache
from types import SimpleNamespace

from pipelines.config import RunConfig, load_config
from pipelines.runtime.tables import Table
from pipelines.sizing.amounts import Parts, Range, StageSize, size_text, time_text, total
from pipelines.sizing.base import BaseShape, shape_from
from pipelines.sizing.distilling import distill_size
from pipelines.sizing.hardware import ACCELERATORS, USABLE, Accelerator
from pipelines.sizing.heads import heads_shape
from pipelines.sizing.pace import GpuPace
from pipelines.sizing.rows import ANSWER_SHARE, RowCounts
from pipelines.sizing.serving import batch_size, bench_size, serve_size, tokens_a_second, tree_size
from pipelines.sizing.training import train_size

COMMAND = "hydra-heads config --sizes > cluster/SIZES.md"
COUNTS = (1, 8, 32)
VOCABULARY = 128_256
SHAPES = {"1B": (16, 2048, 32, 64, 8192, True), "8B": (32, 4096, 32, 128, 14336, False), "70B": (80, 8192, 64, 128, 28672, False)}
"""Name -> layers, width, query heads, width of one, width of the MLP, tied; 8 heads of keys and values each."""
GPUS = {"80 GB": ("H100", "A100-80GB"), "141 GB": ("H200", "H200")}
"""Size -> the faster and the slower accelerator of it that times are computed for."""
HEADS = {"medusa": {"kind": "medusa", "draft_vocab_size": 32768}, "hydra": {"kind": "hydra", "draft_vocab_size": 32768},
         "hydra++": {"kind": "hydra++", "draft_vocab_size": 32768}}
PROMPTS, ROWS, ANSWER = 20_000, 100_000, 512
"""Prompts that are distilled, rows that a batch answers, and the limit of such an answer in tokens."""
PROMPT_TOKENS, ANSWER_TOKENS = 150, 500
"""Mean lengths of prompts and of answers, of which each prompt gets two."""
MEMORY = ("GPU memory of a worker, and whether it fits: **no** where even the least does not. The engine does not "
          "split a base among GPUs (it has no tensor parallelism): what does not fit on one GPU does not run here, "
          "however many there are. `train` loads only embedding and vocabulary projection, so heads of such a base "
          "can be trained if rows with its hidden states come from elsewhere. `tree` leaves out sizes that take more"
          " than half of the free memory. `bench` loads float64 weights only where an answer differs from plain "
          "decoding's.")
STORAGE = ("In all, for any number of GPUs: rows and hidden states of `distill`; of `train` the checkpoints of one "
           "drafter while it trains, of which the finished heads stay. Between workers and storage, for 8 workers: "
           "rows to the storage and back, the base to each worker, and gradients and weights, which stay inside a "
           "machine where its GPUs are.")
TIME = ("`tree` and `bench` measure on one GPU, whatever there is. Speeds of `serve` are of all replicas together "
        "with full batches, from plain decoding on the slower GPU to drafts that are accepted on the faster one. "
        "Lower ends assume that nothing but the datasheet's figures limits the GPU, upper ends what was seen where"
        " the host did.")


def sizes_page() -> str:
    """The whole page. It depends on nothing but the formulas."""
    intro = (f"Made by `{COMMAND}`, with the formulas of `--plan`, which tests compare with small cases that were "
             "measured. **All of it is estimated: none of these bases was run on these machines.** Bytes reach from the "
             "least to the most that is expected; times from what the datasheet allows to what a slower GPU and the host's "
             "work make of it. `--plan` of any stage (with `--json`: as fields) says the same for your settings, and refuses "
             "what cannot fit.")
    parts = ["# What it takes, by size of the base and number of GPUs", "", _wrapped(intro), "", _wrapped(_assumed()), "",
             "## The bases and their heads", "", _bases().markdown()]
    parts += ["## Memory of one worker", "", _wrapped(MEMORY), "", _memory().markdown(), "## Storage and network", "",
              _wrapped(STORAGE), "", _storage().markdown(), "## Time", "", _wrapped(TIME)]
    for memory in GPUS:
        parts += ["", f"On GPUs of {memory} ({_names(memory)}):", "", _times(memory).markdown().rstrip()]
    return "\n".join([*parts, ""])


@cache
def shape_of_page(name: str) -> BaseShape:
    """A Llama-type base of the page."""
    layers, width, heads, head, inner, tied = SHAPES[name]
    return shape_from(name, SimpleNamespace(
        model_type="llama", num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=8,
        head_dim=head, intermediate_size=inner, vocab_size=VOCABULARY, max_position_embeddings=8192, tie_word_embeddings=tied),
        "bf16")


def settings_of_page(count: int) -> RunConfig:
    """The settings with `count` GPUs, one for each worker."""
    return load_config(None, {
        "storage": "/", "name": "page-of-sizes", "prompts.source": "jsonl", "prompts.path": "/prompts.jsonl",
        "distill.max_new_tokens": 1024, "distill.max_batch_size": 64, "distill.workers.count": count, "distill.workers.gpus": 1,
        "train.drafters": HEADS, "train.epochs": 2, "train.rows_per_step": 64, "train.precision": "bf16", "train.zero_stage": 2,
        "train.workers.count": count, "train.workers.gpus": 1, "bench.max_new_tokens": 256, "serve.replicas": count,
        "serve.workers.gpus": 1, "serve.max_batch_size": 16,
        "batch.input": "/prompts.jsonl", "batch.limit": ROWS, "batch.max_new_tokens": ANSWER})


@cache
def sizes_of(name: str, count: int, memory: str) -> dict[str, StageSize]:
    """Stage -> what it takes, of one base on `count` GPUs of one size."""
    config, base = settings_of_page(count), shape_of_page(name)
    fast, slow = (_accelerator(gpu) for gpu in GPUS[memory])
    pace, answers = GpuPace(fast, slow), 2 * PROMPTS
    rows = RowCounts(Range.of(PROMPTS), Range.of(answers), Range.of(answers * PROMPT_TOKENS), Range.of(answers * ANSWER_TOKENS))
    found = {"distill": distill_size(config, base, rows, pace, "", True)}
    found |= {f"train {kind}": train_size(config, kind, base, rows, pace, "", count) for kind in HEADS}
    decoding = {"tree": tree_size, "bench": bench_size, "serve": serve_size, "batch": batch_size}
    return found | {stage: size(config, base, pace, "", True) for stage, size in decoding.items()}


def fits(parts: Parts, memory: int) -> str:
    """Whether the GPU memory of a worker fits `memory` bytes: yes, perhaps or no."""
    need = total(parts)
    return "yes" if need.high <= memory else "perhaps" if need.low <= memory else "**no**"


def runs(name: str, memory: str) -> bool:
    """Whether one GPU of that size can hold the base at all."""
    return total(sizes_of(name, 1, memory)["distill"].device).low <= _accelerator(GPUS[memory][1]).usable


def _accelerator(name: str) -> Accelerator:
    return next(one for one in ACCELERATORS if one.name == name)


def _names(memory: str) -> str:
    return " or ".join(dict.fromkeys(reversed(GPUS[memory])))


def _assumed() -> str:
    config = settings_of_page(1)
    distill, train, serve = config.distill, config.train, config.serve
    return (f"Assumed: bf16; {PROMPTS:,} prompts of {PROMPT_TOKENS} tokens, two answers each of {ANSWER_TOKENS} tokens (at most "
            f"{distill.max_new_tokens:,}), in batches of {distill.max_batch_size}; {train.epochs:g} epochs with "
            f"{train.rows_per_step} rows a step, ZeRO-{train.zero_stage}, {train.precision}, a draft vocabulary of 32,768; "
            f"replicas of {serve.max_batch_size} sequences of 8,192 tokens; a batch of {ROWS:,} rows of at most {ANSWER} tokens, "
            f"{ANSWER_SHARE:.0%} of that or more. One GPU a worker. "
            "The GPUs' figures are those of NVIDIA's public datasheets; a program can "
            f"use {USABLE:.0%} of the memory.")


def _bases() -> Table:
    rows = []
    for name, (layers, width, *_) in SHAPES.items():
        base = shape_of_page(name)
        heads = [heads_shape(base, config) for config in settings_of_page(1).train.drafters.values()]
        rows.append([name, f"{layers} x {width:,}", f"{base.parameters / 1e9:.2f} billion", _bytes(base.weight_bytes()),
                     _bytes(base.kv_bytes), _bytes(base.width * base.item),
                     *(f"{shape.parameters / 1e6:,.0f} million" for shape in heads)])
    return Table(["base", "layers x width", "parameters", "weights", "keys and values of a token", "hidden state of a token",
                  *(f"{kind} heads" for kind in HEADS)], rows)


def _memory() -> Table:
    stages = ("distill", "train hydra++", "tree", "bench", "serve")
    rows = []
    for name in SHAPES:
        for stage in stages:
            for count in COUNTS if stage.startswith("train") else COUNTS[:1]:
                size = sizes_of(name, count, "80 GB")[stage]
                where = f"{stage}, {count} worker{'s' if count > 1 else ''}" if stage.startswith("train") else stage
                rows.append([name, where, size_text(total(size.device)), _largest(size.device),
                             *(fits(size.device, _accelerator(gpus[1]).usable) for gpus in GPUS.values()),
                             size_text(total(size.memory))])
    return Table(["base", "stage", "GPU memory of a worker", "of it", "80 GB", "141 GB", "memory of its machine, a worker"], rows)


def _largest(parts: Parts) -> str:
    name, amount = max(parts.items(), key=lambda part: part[1].high)
    return f"{name} {size_text(amount)}"


def _storage() -> Table:
    rows = []
    for name in SHAPES:
        sizes = sizes_of(name, 8, "80 GB")
        train = sizes["train hydra++"]
        (checkpoints, finished) = train.storage.values()
        rows.append([name, size_text(sizes["distill"].storage["hidden states"]), size_text(sizes["distill"].storage["answers"]),
                     size_text(checkpoints), size_text(finished), size_text(total(sizes["distill"].network)),
                     size_text(total(train.network)), size_text(total(train.scratch))])
    return Table(["base", "hidden states", "answers", "checkpoints of hydra++", "finished heads", "network of distill",
                  "network of train hydra++", "/tmp of a training worker"], rows)


def _times(memory: str) -> Table:
    rows = []
    for name in SHAPES:
        here = runs(name, memory)
        for count in COUNTS:
            sizes = sizes_of(name, count, memory)
            timed = {stage: time_text(size.seconds) if size.seconds else "" for stage, size in sizes.items()}
            alone = [(timed[stage] if count == 1 else "as with 1") if here else "does not fit" for stage in ("tree", "bench")]
            rows.append([name, str(count), timed["distill"] if here else "does not fit", timed["train medusa"],
                         timed["train hydra"], timed["train hydra++"], *alone,
                         _speed(name, count, memory) if here else "does not fit", timed["batch"] if here else "does not fit"])
    return Table(["base", "GPUs", "distill", "train medusa", "train hydra", "train hydra++", "tree", "bench", "serve, tokens/s",
                  f"batch of {ROWS:,}"], rows)


def _speed(name: str, count: int, memory: str) -> str:
    fast, slow = (_accelerator(gpu) for gpu in GPUS[memory])
    config, base = settings_of_page(count), shape_of_page(name)
    return tokens_a_second(base, GpuPace(fast, slow), config.serve.max_batch_size, True, count)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


def _bytes(value: float) -> str:
    return size_text(Range.of(value))

