from .address import registry_uri, tracking_uri, ui_command
from .registry import NotRegistered, record_champion, register, resolve
from .run_tags import hardware_tags, run_tags
from .runs import MetricLogger, Run, Tracker, flatten, log_or_keep, metric_logger
from .search import Chain, Input, RunReader, RunRecord
from .system_metrics import system_metrics, worker_system_metrics

__all__ = ["Chain", "Input", "MetricLogger", "NotRegistered", "Run", "RunReader", "RunRecord", "Tracker", "flatten",
           "hardware_tags", "log_or_keep", "metric_logger", "record_champion", "register", "registry_uri", "resolve", "run_tags",
           "system_metrics", "tracking_uri", "ui_command", "worker_system_metrics"]
