from .ablate import AblateSection, Variant
from .base import BaseSection, TrackingSection, Workers
from .batch import BatchSection
from .bench import BenchSection, CompareSection, PromoteSection
from .distill import DistillSection, PromptsSection
from .generate import GenerateSection
from .load import LoadSection
from .reference import Setting, list_settings, nearest, nearest_setting, reference_page
from .run import STORAGE_VARIABLE, RunConfig, load_config, parse_override, present_name, to_yaml
from .section import Section, Size
from .serve import ServeSection
from .train import TrainSection, TrainWorkers
from .tree import NgramSection, TreeSection

__all__ = [
           "STORAGE_VARIABLE",
           "AblateSection",
           "BaseSection",
           "BatchSection",
           "BenchSection",
           "CompareSection",
           "DistillSection",
           "GenerateSection",
           "LoadSection",
           "NgramSection",
           "PromoteSection",
           "PromptsSection",
           "RunConfig",
           "Section",
           "ServeSection",
           "Setting",
           "Size",
           "TrackingSection",
           "TrainSection",
           "TrainWorkers",
           "TreeSection",
           "Variant",
           "Workers",
           "list_settings",
           "load_config",
           "nearest",
           "nearest_setting",
           "parse_override", "present_name",
           "reference_page",
           "to_yaml",
]
