from .ablate import AblateSection, Distribution, Variant
from .base import BaseSection, Reserved, TrackingSection, Workers
from .batch import BatchSection
from .bench import BenchSection, PromoteSection
from .cluster import ClusterSection
from .compare import CompareSection
from .curve import CurveSection
from .datacard import DatacardSection
from .distill import DistillSection, PromptsSection
from .generate import GenerateSection
from .load import LoadSection
from .loop import LoopSection
from .reference import Setting, list_settings, nearest, nearest_setting, reference_page
from .run import STORAGE_VARIABLE, RunConfig, load_config, parse_override, present_name, to_yaml
from .section import Section, Size
from .serve import RecordSection, ServeSection
from .train import TrainSection, TrainWorkers
from .tree import DraftModelSection, NgramSection, TreeSection
from .vllm import VllmSection

__all__ = [
           "STORAGE_VARIABLE",
           "AblateSection",
           "BaseSection",
           "BatchSection",
           "BenchSection",
           "ClusterSection",
           "CompareSection",
           "CurveSection",
           "DatacardSection",
           "DistillSection",
           "Distribution",
           "DraftModelSection",
           "GenerateSection",
           "LoadSection",
           "LoopSection",
           "NgramSection",
           "PromoteSection",
           "PromptsSection",
           "RecordSection",
           "Reserved",
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
           "VllmSection",
           "Workers",
           "list_settings",
           "load_config",
           "nearest",
           "nearest_setting",
           "parse_override",
           "present_name",
           "reference_page",
           "to_yaml",
]
