"""Manifests for Kubernetes and Ray's cluster launcher, made from the settings as plain dicts and written as YAML."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
