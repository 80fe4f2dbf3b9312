from .configuration import (
           DecodingConfiguration,
           check_heads,
           load_configuration,
           load_heads,
           read_configuration,
           save_configuration,
)
from .engine import Engine
from .naive import naive_generate
from .near_ties import Comparison, compare
from .records import Result, StepOutput
from .request_engine import RequestEngine
from .text import TextStream
from .verify import accept, accept_walking

__all__ = ["Comparison", "DecodingConfiguration", "Engine", "RequestEngine", "Result", "StepOutput", "TextStream", "accept",
           "accept_walking", "check_heads", "compare", "load_configuration", "load_heads", "naive_generate", "read_configuration",
           "save_configuration"]
