"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`).

It names one architecture and touches nothing else: vLLM imports `vllm_model` when a drafter of that architecture is loaded, and
then alone are its methods replaced (`vllm_compat`).
"""

from __future__ import annotations

import logging

from hydra_core.interop.vllm_format import ARCHITECTURE

log = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM's registry which class runs exported heads. It never raises: whoever uses no heads must not notice it."""
    try:
        from hydra_core.interop import vllm_compat

        vllm_compat.register_model(ARCHITECTURE, "hydra_core.interop.vllm_model:DraftChain")
    except Exception as error:
        log.warning("hydra-heads: exported heads cannot be loaded by this vLLM (%s: %s)", type(error).__name__, error)
