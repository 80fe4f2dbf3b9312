"""Who drafts while decoding: heads, copied text, both in a tree that is grown at each step, or nobody."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
