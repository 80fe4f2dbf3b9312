from .served_app import ServedApp
from .stage import build_app, run_serve, start_app

__all__ = ["ServedApp", "build_app", "run_serve", "start_app"]
