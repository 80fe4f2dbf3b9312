from .official import ImportedHeads, import_official
from .official_files import check_places
from .vllm_export import VllmExport, export_to_vllm, serve_command, taken_word, why_not_in_vllm
from .vllm_format import ARCHITECTURE, KEY, ExportedHeads, check_tensors

__all__ = ["ARCHITECTURE", "KEY", "ExportedHeads", "ImportedHeads", "VllmExport", "check_places", "check_tensors",
           "export_to_vllm", "import_official", "serve_command", "taken_word", "why_not_in_vllm"]
