"""Draft trees: their shape here, the search for the one that pays best beside it."""

from hydra_core.tree.topology import PLAIN, RankPath, Topology, Tree, TreeSet, chain, default_trees

__all__ = ["PLAIN", "RankPath", "Topology", "Tree", "TreeSet", "chain", "default_trees"]
