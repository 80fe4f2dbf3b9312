from .batch import TreeBatch, chain
from .draft_tree import PLAIN, DraftTree, RankPath, TreeSet, default_trees

__all__ = ["PLAIN", "DraftTree", "RankPath", "TreeBatch", "TreeSet", "chain", "default_trees"]
