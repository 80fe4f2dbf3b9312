"""Draft trees: their shape here, the search for the one that pays best beside it."""

from hydra_core.tree.forest import Forest
from hydra_core.tree.topology import PLAIN, RankPath, Topology, Tree, TreeSet, chain, default_trees

__all__ = ["PLAIN", "Forest", "RankPath", "Topology", "Tree", "TreeSet", "chain", "default_trees"]
