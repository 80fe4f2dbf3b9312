from .folders import FOLDER, SHIPPED, shipped_configuration

__all__ = ["FOLDER", "SHIPPED", "shipped_configuration"]
