"""Draft-head speculative decoding: torch in, torch out, no cluster.

    from hydra_core import Engine, load_base, load_heads

    base = load_base("embedded:smollm2-135m")
    engine = Engine(base, *load_heads("/data/heads", base))  # Engine(base) decodes plainly: the same tokens
    print(engine.answer(["What is a draft tree?"], max_new_tokens=64))
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
