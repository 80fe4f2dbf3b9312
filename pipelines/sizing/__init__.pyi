from .page import sizes_page
from .plan import plan_of
from .report import Plan

__all__ = ["Plan", "plan_of", "sizes_page"]
