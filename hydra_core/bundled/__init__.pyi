from .folders import BUNDLED, FOLDER, bundled_configuration

__all__ = ["BUNDLED", "FOLDER", "bundled_configuration"]
