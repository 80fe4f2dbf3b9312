from .official import ImportedHeads, import_official
from .official_files import check_places

__all__ = ["ImportedHeads", "check_places", "import_official"]
