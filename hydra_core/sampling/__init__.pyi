from .request import Request, TokenLogprob, Typical, choices
from .sampler import Chooser, choose

__all__ = ["Chooser", "Request", "TokenLogprob", "Typical", "choices", "choose"]
