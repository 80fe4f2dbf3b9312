"""Exported heads as a model that vLLM loads: it drafts a chain of each head's most probable token.

The heads are this project's own (`hydra_core.heads`), with their packed and compiled forms on a CPU. vLLM checks the chain with
its own rejection sampling, so its tokens, greedy or sampled, stay distributed as without heads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary, VocabHead, argmax
from hydra_core.errors import InputError
from hydra_core.heads.draft_vocab import DraftVocab
from hydra_core.heads.registry import build_drafter
from hydra_core.interop import vllm_compat
from hydra_core.interop.vllm_compat import Asked
from hydra_core.interop.vllm_format import BIAS, IDS, KEY, ROWS, ExportedHeads, check_tensors

log = logging.getLogger(__name__)


class DraftChain(vllm_compat.Chain):
    """The heads of an export, in vLLM's dtype and on its device.

    `vllm_config`: vLLM's configuration. Raises InputError for an export of another schema or for another target, for more drafted
    tokens than there are heads, and for pipeline parallelism, where the embedding is on another rank than the drafter.
    """

    ids: Tensor

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        asked = vllm_compat.asked_of(vllm_config)
        self.about = about = ExportedHeads.from_config(getattr(asked.about, KEY, None))
        _check(about, asked)
        count = about.heads.draft_vocab_size
        self.rows = nn.Parameter(torch.zeros(count, about.width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(count), requires_grad=False) if about.bias else None
        self.register_buffer("ids", torch.arange(count))
        head = VocabHead(self.rows, self.bias)
        vocabulary = BaseVocabulary(BaseIdentity(**about.base, weight_format="any"), None, (), self.rows, torch.ones(about.width),
                                    about.norm_eps, head)
        self.drafter = build_drafter(about.heads, vocabulary, DraftVocab(torch.arange(count), count))
        self.drafter.rows = head
        self.drafter.eval().requires_grad_(False)
        self._loaded = False
        self._roots: Tensor | None = None
        self._embedding: list[nn.Module] = []  # a list, so that it is no submodule: it is the target's
        vllm_compat.install()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the export's tensors, all of them and no other; returns the names of the parameters. Raises InputError."""
        found = dict(weights)
        wanted = {**self.drafter.state_dict(), ROWS: self.rows, IDS: self.ids, **({} if self.bias is None else {BIAS: self.bias})}
        check_tensors(found, wanted)
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(found[name])
        self._loaded = True
        return {name for name, _ in self.named_parameters()}

    def train(self, mode: bool = True) -> DraftChain:
        """vLLM calls `eval` last, after loading: then the weights are packed for this processor."""
        super().train(mode)
        if self._loaded and not mode:
            self.drafter.pack()
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, D] to [B, D], the first head after tokens whose embeddings are zero: vLLM only measures memory with it."""
        path = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[-1])
        return self.drafter.head_hidden(0, hidden_states.to(self.drafter.weight.dtype), path)

    def begin(self, roots: Tensor, target: nn.Module) -> None:
        if not self._embedding:
            self._embedding.append(vllm_compat.embedding_of(target, self.about.width))
        self._roots = roots

    @torch.inference_mode()
    def draft(self, hidden: Tensor, count: int) -> Tensor:
        assert self._roots is not None and len(self._roots) == len(hidden)
        features, token = hidden.to(self.drafter.weight.dtype), self._roots
        path, drafted = features.new_zeros(len(hidden), 1, 0, features.shape[-1]), []
        for depth in range(count):
            if self.drafter.config.sequential:
                read = self.drafter.as_read(self._embedding[0](token))
                path = torch.cat((path, read[:, None, None]), dim=2)
            token = self.ids[argmax(self.drafter.candidate_logits(depth, features, path)[:, 0])]
            drafted.append(token)
        self._roots = None
        return torch.stack(drafted, dim=1) if drafted else token.new_zeros(len(hidden), 0)


def _check(about: ExportedHeads, asked: Asked) -> None:
    """Raise InputError where these heads cannot draft as `asked`."""
    if (about.width, about.vocab_size) != (asked.width, asked.vocab_size):
        raise InputError(f"these heads belong to {about.base['name']} (width {about.width}, vocabulary {about.vocab_size}), not "
                         f"to this target (width {asked.width}, vocabulary {asked.vocab_size}): serve their base")
    if asked.count > about.heads.num_heads:
        raise InputError(f"num_speculative_tokens={asked.count}: there are {about.heads.num_heads} heads, one for each token")
    if asked.stages > 1:
        raise InputError(f"pipeline_parallel_size={asked.stages}: the heads read token embeddings, which the last stage does not "
                         "have: use tensor_parallel_size")
    if asked.ranks > 1:
        log.warning("hydra-heads: every one of the %s ranks drafts by itself, which no test has tried on GPUs", asked.ranks)


