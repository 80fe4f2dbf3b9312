from .request import Request, TokenLogprob, Typical, choices
from .sampler import Sampler, sample

__all__ = ["Request", "Sampler", "TokenLogprob", "Typical", "choices", "sample"]
