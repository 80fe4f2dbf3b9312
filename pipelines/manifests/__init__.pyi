from .files import PARTS, cluster_files, part_text, write_files
from .overlays import OVERLAYS
from .target import Heads, Target

__all__ = ["OVERLAYS", "PARTS", "Heads", "Target", "cluster_files", "part_text", "write_files"]
