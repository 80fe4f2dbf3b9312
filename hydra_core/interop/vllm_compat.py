"""The one file that touches vLLM's insides. Another version of vLLM is another version of this file.

vLLM drafts with Medusa heads in `MedusaProposer.propose`, to which it gives hidden states and no tokens. Here the runner's
method before it also keeps the tokens that were just sampled, and a `Chain` drafts in place of vLLM's own loop. For drafters of
any other class both methods do what they did.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from hydra_core.errors import InputError

TESTED = ((0, 32), (0, 33))
"""Versions of vLLM that the tests run: from the first, up to but without the second."""
log = logging.getLogger(__name__)


class Chain(nn.Module):
    """A drafter that vLLM loads as a model, and that `install` lets draft."""

    def begin(self, roots: Tensor, target: nn.Module) -> None:
        """Before each `draft`: `roots` [B] int64, the newest token of each sequence; `target`: the base as vLLM runs it."""
        raise NotImplementedError

    def draft(self, hidden: Tensor, count: int) -> Tensor:
        """`count` tokens for each sequence, [B, count] int64; `hidden`: [B, D], after the base's final norm, at the position
        before the root."""
        raise NotImplementedError


@dataclass(frozen=True)
class Asked:
    """What vLLM's configuration asks of a drafter. `about`: the drafter's config.json, as an object; `count`: drafted tokens;
    `width`, `vocab_size`: of the target; `stages`, `ranks`: of its pipeline and tensor parallelism."""

    about: Any
    count: int
    width: int
    vocab_size: int
    stages: int
    ranks: int


def register_model(architecture: str, where: str) -> None:
    """Name the class of an architecture, as `module:Class`, without importing it."""
    from vllm.model_executor.models import ModelRegistry

    ModelRegistry.register_model(architecture, where)


def asked_of(vllm_config: Any) -> Asked:
    """Read a `VllmConfig` that has a `speculative_config`."""
    speculative, target, parallel = vllm_config.speculative_config, vllm_config.model_config, vllm_config.parallel_config
    return Asked(speculative.draft_model_config.hf_config, speculative.num_speculative_tokens, target.get_hidden_size(),
                 target.get_vocab_size(), parallel.pipeline_parallel_size, parallel.tensor_parallel_size)


def warn_of_other_versions(version: str, parsed: Sequence[Any]) -> bool:
    """Log one line where vLLM `version`, `parsed` into numbers, is outside `TESTED`; returns whether it is inside."""
    inside = TESTED[0] <= tuple(parsed[:2]) < TESTED[1]
    if not inside:
        (first, second), (third, fourth) = TESTED
        log.warning("hydra-heads: vLLM %s is outside the tested range (>=%s.%s,<%s.%s): tokens stay those of vLLM, which checks "
                    "every draft, but look at the acceptance rate", version, first, second, third, fourth)
    return inside


def install() -> None:
    """Let drafters of class `Chain` draft. Once a process; called again it does nothing."""
    import vllm
    from vllm.v1.spec_decode.medusa import MedusaProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if getattr(MedusaProposer, "hydra_heads", False):
        return
    warn_of_other_versions(vllm.__version__, vllm.__version_tuple__)
    propose, propose_ids = MedusaProposer.propose, GPUModelRunner.propose_draft_token_ids

    def keep_tokens(runner: Any, scheduler_output: Any, sampled_token_ids: Any, *rest: Any, **words: Any) -> Any:
        chain = getattr(getattr(runner, "drafter", None), "model", None)
        if isinstance(chain, Chain):
            # a prompt that is not read to its end has no new token, and vLLM drops what is drafted for it
            newest = [tokens[-1] if tokens else 0 for tokens in sampled_token_ids]
            chain.begin(torch.tensor(newest, dtype=torch.int64, device=runner.device), runner.get_model())
        return propose_ids(runner, scheduler_output, sampled_token_ids, *rest, **words)

    def draft_chain(proposer: Any, num_speculative_tokens: int, target_hidden_states: Tensor, *rest: Any, **words: Any) -> Any:
        if isinstance(chain := proposer.model, Chain):
            return chain.draft(target_hidden_states, num_speculative_tokens)
        return propose(proposer, num_speculative_tokens, target_hidden_states, *rest, **words)

    MedusaProposer.propose, GPUModelRunner.propose_draft_token_ids = draft_chain, keep_tokens
    MedusaProposer.hydra_heads = True


def embedding_of(target: nn.Module, width: int) -> nn.Module:
    """The target's token embedding: called with ids [B] it gives rows [B, D], gathered from all ranks. Raises RuntimeError where
    the target has none of this width."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [(name, module) for name, module in target.named_modules()
             if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
             and module.embedding_dim == width]
    # a model may embed more than text: the table of the tokens has the usual name
    for name, module in sorted(found, key=lambda pair: not pair[0].endswith(("embed_tokens", "embed_in", "wte"))):
        embedding: nn.Module = module
        log.debug("hydra-heads: embeddings come from %s", name)
        return embedding
    raise RuntimeError(f"hydra-heads: {type(target).__name__} has no token embedding of width {width} that the heads could read")


class StepCounts:
    """What vLLM's scheduler counts of the drafts of a step, tokens `drafted` and `accepted`, and `kv_use`, the share of the key
    and value slots in use after it. It belongs to one engine that `start_engine` has started."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self.kv_use = 0.0

    def take(self) -> tuple[int, int]:
        """Drafted and accepted tokens since the last call."""
        found = self.drafted, self.accepted
        self.drafted = self.accepted = 0
        return found

    def factory(self) -> Any:
        """The class that vLLM calls after each step: it adds to these counts."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        counts = self

        class Logger(StatLoggerBase):  # type: ignore[misc]  # vLLM's class is not known where vLLM is missing
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
                if scheduler_stats is not None:
                    counts.kv_use = scheduler_stats.kv_cache_usage
                if (drafts := getattr(scheduler_stats, "spec_decoding_stats", None)) is not None:
                    counts.drafted += drafts.num_draft_tokens
                    counts.accepted += drafts.num_accepted_tokens

            def log_engine_initialized(self) -> None:
                pass

        return Logger


ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
"""Variables of vLLM's that are set unless somebody has: one process, which ends with the one that started it and takes its memory
along, however that ends; nothing is sent to vLLM's makers; warnings are logged alone."""


def start_engine(arguments: dict[str, Any], counts: StepCounts) -> Any:
    """vLLM's `LLMEngine` with these `EngineArgs`, whose steps `counts` counts. Raises InputError for an argument that this vLLM
    does not have, and whatever vLLM raises."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import EngineArgs, LLMEngine

    if unknown := sorted(arguments.keys() - {field.name for field in fields(EngineArgs)}):
        raise InputError(f"vllm.arguments.{unknown[0]}: this vLLM has no such engine argument")
    return LLMEngine.from_engine_args(EngineArgs(**arguments), stat_loggers=[counts.factory()])


def stop_engine(engine: Any) -> None:
    """End an engine that `start_engine` has started, so that another one may start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def most_prompt_tokens(engine: Any) -> int:
    """Prompt tokens that a step of the engine computes at most."""
    return int(engine.vllm_config.scheduler_config.max_num_batched_tokens)
