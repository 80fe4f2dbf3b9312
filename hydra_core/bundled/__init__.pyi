from .folders import BUNDLED, EARLIER, FOLDER, bundled_configuration, is_bundled

__all__ = ["BUNDLED", "EARLIER", "FOLDER", "bundled_configuration", "is_bundled"]
