from .address import tracking_uri, ui_command
from .registry import NotRegistered, register, resolve
from .runs import MetricLogger, Run, Tracker, flatten, metric_logger
from .search import RunRecord, find_benches

__all__ = ["MetricLogger", "NotRegistered", "Run", "RunRecord", "Tracker", "find_benches", "flatten", "metric_logger",
           "register", "resolve", "tracking_uri", "ui_command"]
