"""The stages on Ray, one folder each, over what they share: `profiling`, `tracking`, `runtime`, `rows`, `config`."""
