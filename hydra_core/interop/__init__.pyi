from .official import ImportedHeads, import_official
from .official_files import check_places
from .vllm_engine import VllmEngine, VllmSettings
from .vllm_export import (
    VllmExport,
    check_count,
    export_once,
    export_to_vllm,
    exportable,
    serve_command,
    speculative_of,
    taken_word,
    why_not_in_vllm,
)
from .vllm_format import ARCHITECTURE, KEY, ExportedHeads, check_tensors
from .vllm_installed import InstalledVllm, check_vllm

__all__ = ["ARCHITECTURE", "KEY", "ExportedHeads", "ImportedHeads", "InstalledVllm", "VllmEngine", "VllmExport", "VllmSettings",
           "check_count", "check_places", "check_tensors", "check_vllm", "export_once", "export_to_vllm", "exportable",
           "import_official", "serve_command", "speculative_of", "taken_word", "why_not_in_vllm"]
