from .forest import Forest
from .topology import PLAIN, RankPath, Topology, Tree, TreeSet, chain, default_trees

__all__ = ["PLAIN", "Forest", "RankPath", "Topology", "Tree", "TreeSet", "chain", "default_trees"]
