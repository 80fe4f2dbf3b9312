"""Draft-head speculative decoding: torch in, torch out, no cluster.

    from hydra_core import Engine, load_base, load_heads

    base = load_base("embedded:smollm2-135m")
    engine = Engine(base, *load_heads("/data/heads", base))  # Engine(base) decodes plainly: the same tokens
    print(engine.answer(["What is a draft tree?"], max_new_tokens=64))
"""

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine, Request, Result, Typical, choices, load_heads, naive_generate
from hydra_core.drafters import AdaptiveDrafter, NgramDrafter
from hydra_core.errors import InputError

__all__ = ["AdaptiveDrafter", "Base", "Engine", "InputError", "NgramDrafter", "Request", "Result", "Typical", "choices",
           "load_base", "load_heads", "naive_generate"]
