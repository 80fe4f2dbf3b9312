"""The settings of `bench` and `promote`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.config.section import Section, Size

SHARED_ANSWERS = 2**18
"""Tokens of earlier answers that the contender `suffix` keeps by default."""
VLLM = "vllm"
"""vLLM without drafts; `vllm+NAME` drafts there with its own n-gram lookup (NAME `ngram`) or with heads."""


def is_vllm(method: str) -> bool:
    """Whether a contender of `bench` is vLLM."""
    return method == VLLM or method.startswith(f"{VLLM}+")


class BenchSection(Section):
    """Measurement of every way of decoding, on the same prompts in one run."""

    renamed: ClassVar[dict[str, str]] = {"running_batch": "max_batch_size", "load": "concurrency",
                                         "load_requests": "concurrency_requests"}

    prompts: str | None = Field(None, description="JSONL of `prompt` or Spec-Bench's format; default: held-out prompts")
    heads: str | None = Field(None, description="one checkpoint folder, or `bundled`, to bench instead of this run's own")
    limit: int | None = Field(None, ge=1, description="number of questions; default: all of `prompts`, or 24 held-out ones")
    max_new_tokens: int = Field(64, ge=1, description="length limit of an answer, in tokens")
    rounds: int = Field(1, ge=1, description="how often each question is timed")
    methods: tuple[str, ...] = Field(
        (), description="contenders besides plain; empty: transformers, ngram, every drafter found, combined, and "
                        "draft-model where draft_model.model names one. More: "
                        "transformers-lookup; llama.cpp (a GGUF base, and llama-cpp-python); suffix, drafts from the text and "
                        "from earlier answers; NAME@N, a drafter NAME with the best fixed tree of at most N nodes; vllm, "
                        "vllm+ngram and vllm+NAME, in a process of its own; vllm+NAME@N: at most N drafted tokens")
    vllm_python: str | None = Field(None, description="path of the Python that runs vLLM, of an environment that has it and this "
                                                      "project; default: the one that runs the stage")
    vllm_settings: dict[str, Any] = Field(
        {}, description="further arguments of vLLM's `LLM`, as {enforce_eager: true} or {tensor_parallel_size: 2}")
    shared_answers: int = Field(
        0, ge=0, description="tokens of earlier answers of the same round that ngram, combined and bundled draft from too, as "
                             f"with serve.shared_answers; 0: none, and {SHARED_ANSWERS} for the contender `suffix`")
    prefix_cache_tokens: int = Field(
        0, ge=0, description="tokens of finished questions of the same round whose keys and values each contender of our engine "
                             "keeps, as with serve.prefix_cache_tokens: a second turn begins sooner; 0: none")
    champion: Literal["auto"] | bool = Field(
        "auto", description="time the registry's champion (promote.model_name, promote.alias) too, as the contender `@champion`: "
                            "auto: if it is of this base and is none of the other contenders, and single requests are timed; "
                            "true: always, and an error where there is none")
    turns: int = Field(2, ge=1, description="most turns of a question; a later turn follows plain's answers to the earlier ones")
    single: bool = Field(True, description="time one request at a time; false: only losslessness and throughput")
    identity_prompts: int = Field(8, ge=0, description="prompts on which losslessness in fp32 is checked")
    identity_batch: int = Field(8, ge=0, description="the same in a running batch of so many staggered sequences; 0: no")
    identity_formats: tuple[Literal["fp32", "bf16", "int4"], ...] = Field(
        ("fp32",), description="weight formats in which those are checked against the naive loop")
    batch_prompts: int = Field(0, ge=0, description="prompts decoded together for throughput; 0: not measured")
    max_batch_size: int = Field(32, ge=1, description="sequences in that batch")
    batch_limits: tuple[Literal["equal", "ragged"], ...] = Field(
        ("equal", "ragged"), min_length=1, description="limits in it: max_new_tokens (equal), or drawn from 16 to 400 (ragged)")
    batch_job: bool = Field(False, description="measure there also the stage `batch` with serve.model, and the engine that it "
                                               "uses, called directly (`engine`)")
    concurrency: tuple[Size, ...] = Field(
        (), description="levels of closed-loop load, in requests in flight, as [1,4,16,64]; empty: not measured")
    concurrency_requests: int = Field(
        0, ge=0, description="requests sent at each level; 0: four times the level, and at least 16")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; above 0 transformers and vLLM are left "
                                                         "out")
    shared_noise: bool = Field(True, description="rank drafts with the same noise as the draws: more of them are accepted")
    threads: int = Field(2, ge=1, description="torch threads, and cores of vLLM on a CPU")

    @model_validator(mode="after")
    def _concurrency_is_reached(self) -> BenchSection:
        if 0 < self.concurrency_requests < max(self.concurrency, default=0):
            raise ValueError(f"bench.concurrency_requests={self.concurrency_requests} is fewer than the {max(self.concurrency)} "
                             "of bench.concurrency that are to be in flight at once")
        return self


class PromoteSection(Section):
    """Which configuration becomes `champion`, and what it has to show."""

    model_name: str = Field("hydra-heads", description="name in MLflow's model registry")
    alias: str = Field("champion", description="alias that the promoted version gets")
    min_gain: float = Field(1.0, ge=0, description="least speed against plain; below it plain decoding is promoted")
    margin: float = Field(0.0, ge=0, description="how far above 1 the whole 95 % interval of the speed has to lie, against plain "
                                                 "and against the present champion; 0.05: at least 5 % faster")
    min_questions: int = Field(2, ge=2, description="questions below which a bench decides nothing")
    min_tokens_per_step: float = Field(1.0, ge=1, description="tokens per step that a contender has to exceed")
    category_floor: float = Field(1.0, ge=0, description="speed against plain below which no category may lie with its whole "
                                                         "95 % interval; 0: categories are not looked at")
    max_heads_mb: float | None = Field(None, gt=0, description="largest heads, in megabytes; default: any size")
    force: bool = Field(False, description="promote the fastest contender that passes the other gates, even if it was not "
                                           "compared with the present champion, or is not faster")
    reason: str = Field("", max_length=1000, description="why, in your words: a tag of the versions that a promotion or a "
                                                         "rollback changes")
    dry_run: bool = Field(False, description="print the decision; write and register nothing (`--dry-run`)")
    rollback: bool = Field(False, description="give the alias back to the version that was champion before (`--rollback`)")
