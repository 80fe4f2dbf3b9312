from .configuration import (
           DecodingConfiguration,
           check_heads,
           load_configuration,
           load_heads,
           read_configuration,
           save_configuration,
)
from .draft_models import DraftModelSettings, find_draft_model, open_draft_model
from .engine import Engine
from .naive import naive_generate
from .near_ties import Comparison, compare
from .records import Result, StepOutput
from .request_engine import RequestEngine
from .text import TextStream
from .verify import accept, accept_walking

__all__ = ["Comparison", "DecodingConfiguration", "DraftModelSettings", "Engine", "RequestEngine", "Result", "StepOutput",
           "TextStream", "accept", "accept_walking", "check_heads", "compare", "find_draft_model", "load_configuration",
           "load_heads", "naive_generate", "open_draft_model", "read_configuration", "save_configuration"]
