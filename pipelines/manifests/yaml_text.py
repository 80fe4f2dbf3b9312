"""Plain dicts as the YAML that a person reads."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import yaml

WIDTH = 130


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block; the same dict twice is written out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(value: Any, comment: str = "") -> str:
    """`value` as YAML, below `comment` in lines that begin with #."""
    lines = [f"# {line}" for line in textwrap.wrap(comment, WIDTH - 2, break_long_words=False, break_on_hyphens=False)]
    return "".join(f"{line}\n" for line in lines) + str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=WIDTH))


def to_documents(values: Iterable[Any], comment: str = "") -> str:
    """Several documents in one text."""
    first, *rest = values
    return "---\n".join([to_yaml(first, comment), *(to_yaml(value) for value in rest)])
