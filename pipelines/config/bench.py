"""The settings of `bench`, `compare` and `promote`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.config.section import Section, Size


class BenchSection(Section):
    """Every way of decoding on the same prompts in one run."""

    renamed: ClassVar[dict[str, str]] = {"running_batch": "max_batch_size", "load": "concurrency",
                                         "load_requests": "concurrency_requests"}

    prompts: str | None = Field(None, description="JSONL of `prompt` or Spec-Bench's format; default: held-out prompts")
    heads: str | None = Field(None, description="one checkpoint folder, or `bundled`, to bench instead of this run's own")
    limit: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    rounds: int = Field(1, ge=1)
    methods: tuple[str, ...] = Field(
        (), description="contenders besides plain; empty: transformers, ngram, every drafter found and combined. More: "
                        "transformers-lookup; llama.cpp (a GGUF base, and llama-cpp-python); NAME@N, a drafter NAME with "
                        "the best fixed tree of at most N nodes")
    turns: int = Field(2, ge=1, description="turns of a question, at most; each further one follows plain's own answers")
    single: bool = Field(True, description="decode one request at a time; false: only identity and throughput")
    identity_prompts: int = Field(8, ge=0, description="prompts on which fp32 identity is checked for every drafter")
    identity_batch: int = Field(8, ge=0, description="also in a running batch of so many rows, staggered; 0: no")
    identity_formats: tuple[Literal["fp32", "bf16", "int4"], ...] = Field(
        ("fp32",), description="weight formats in which those are checked against the naive loop")
    batch_prompts: int = Field(0, ge=0, description="prompts decoded together for throughput; 0: not measured")
    max_batch_size: int = Field(32, ge=1, description="rows of that batch")
    batch_limits: tuple[Literal["equal", "ragged"], ...] = Field(
        ("equal", "ragged"), min_length=1, description="of its answers: max_new_tokens each, or drawn from 16 to 400")
    batch_job: bool = Field(False, description="in that, also the way of `batch` with what serve.model names (`batch`), beside "
                                               "the engine that it uses called directly (`engine`)")
    concurrency: tuple[Size, ...] = Field(
        (), description="numbers of requests kept in flight, as [1,4,16,64]; empty: not measured")
    concurrency_requests: int = Field(
        0, ge=0, description="requests sent in all at each of those; 0: four times as many, and at least 16")
    temperature: float = Field(0.0, ge=0, description="above 0 answers are sampled, and transformers is left out")
    shared_noise: bool = Field(True, description="rank drafts by the draws own noise")
    threads: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _concurrency_is_reached(self) -> BenchSection:
        if 0 < self.concurrency_requests < max(self.concurrency, default=0):
            raise ValueError(f"bench.concurrency_requests={self.concurrency_requests} is fewer than the {max(self.concurrency)} "
                             "of bench.concurrency that are to be in flight at once")
        return self


class CompareSection(Section):
    """Benches side by side."""

    runs: tuple[str, ...] = Field((), description="MLflow run ids, or names of runs (`name=`): their latest bench")


class PromoteSection(Section):
    """Which configuration becomes `champion`."""

    model_name: str = "hydra-heads"
    alias: str = "champion"
    min_gain: float = Field(1.0, ge=0, description="speed against plain below which plain itself is promoted")
