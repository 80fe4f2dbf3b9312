"""Decoding: the naive loop that is the reference, and the engine that must equal it."""

from hydra_core.decoding.accept import Accepted, accept, accept_walking
from hydra_core.decoding.choose import Chooser, choose
from hydra_core.decoding.configuration import (
    DecodingConfiguration,
    check_heads,
    load_configuration,
    load_heads,
    read_configuration,
    save_configuration,
)
from hydra_core.decoding.engine import Engine
from hydra_core.decoding.identity import Comparison, compare
from hydra_core.decoding.naive import naive_generate
from hydra_core.decoding.propose import Proposal
from hydra_core.decoding.records import Request, Result, StepOutput, TokenLogprob, Typical, choices
from hydra_core.decoding.text import TextStream

__all__ = [
    "Accepted", "Chooser", "Comparison", "DecodingConfiguration", "Engine", "Proposal", "Request", "Result", "StepOutput",
    "TextStream", "TokenLogprob", "Typical", "accept", "accept_walking", "check_heads", "choices", "choose", "compare",
    "load_configuration", "load_heads", "naive_generate", "read_configuration", "save_configuration",
]
