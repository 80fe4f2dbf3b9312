from .base import Base, load_base
from .decoding import Engine, Result, load_heads, naive_generate
from .errors import InputError
from .proposers import AdaptiveDrafter, NgramDrafter
from .sampling import Request, Typical, choices

__all__ = ["AdaptiveDrafter", "Base", "Engine", "InputError", "NgramDrafter", "Request", "Result", "Typical", "choices",
           "load_base", "load_heads", "naive_generate"]
