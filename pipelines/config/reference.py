"""Every setting by its dotted name, read from the pydantic models: for `--help`, the reference page and error messages."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ANY = "NAME"
"""Stands in a dotted name for the name that the user gives, as in `train.drafters.NAME.kind`."""
NEAR = 0.6
"""Least score, of at most 1.5, at which two names count as near."""
TYPES: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any value"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One setting. `name`: dotted; `kind`, `default`: as a person writes them in YAML; `description`: one line."""

    name: str
    kind: str
    default: str
    description: str


def list_settings(model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[Setting]:
    """Every setting of `model` and of the models inside it, in the order of the code.

    `defaults`: the instance whose values are the defaults, where they are not those of the model's own fields.
    """
    for field, info in model.model_fields.items():
        name = f"{prefix}{info.alias or field}"
        default = getattr(defaults, field) if defaults is not None else info.get_default(call_default_factory=True)
        if (inner := _model(info.annotation)) is not None:
            yield from list_settings(inner, f"{name}.", default if isinstance(default, BaseModel) else None)
            continue
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        yield Setting(name, _kind(info), str(extra.get("default_text") or _text(default)), info.description or "")
        if get_origin(info.annotation) is dict and (inner := _model(get_args(info.annotation)[1])) is not None:
            yield from list_settings(inner, f"{name}.{ANY}.")


def reference_page(model: type[BaseModel]) -> str:
    """Markdown: one table a section, one line a setting."""
    groups: dict[str, list[Setting]] = {}
    for setting in list_settings(model):
        section, dot, _ = setting.name.partition(".")
        groups.setdefault(section if dot else "", []).append(setting)
    lines = ["# Every setting", "",
             "`hydra-heads config --describe` prints this page. Write a setting in a YAML file (`--config FILE`), or as",
             "`section.field=value` after any command. `NAME` stands for a name that you choose."]
    for section, settings in groups.items():
        inner = _model(model.model_fields[section].annotation) if section else None
        about = (inner.__doc__ or "").strip().splitlines()[0] if inner is not None else "The run itself, for every stage."
        lines += ["", f"## {section or 'run'}", "", about, "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{one.name}` | {_cell(one.kind)} | {_cell(one.default)} | {_cell(one.description)} |" for one in settings]
    return "\n".join(lines) + "\n"


def nearest_setting(wanted: str, model: type[BaseModel]) -> str | None:
    """The setting or section of `model` whose name is most like the dotted `wanted`, or None where none is near."""
    names: list[str] = []
    for name in (setting.name for setting in list_settings(model)):
        sections = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
        names += [one for one in (*sections, name) if one not in names and not one.endswith(f".{ANY}")]
    return nearest(wanted, names)


def nearest(wanted: str, names: Iterable[str]) -> str | None:
    """The one of dotted `names` that is most like `wanted`, or None.

    What counts is the last part, above all a whole word of it (`steps` and `max_steps`), and then the section.
    """
    best, found = NEAR, None
    for name in names:
        filled = _filled(name, wanted)
        if (score := _likeness(wanted, filled)) > best:
            best, found = score, filled
    return found


def _likeness(wanted: str, name: str) -> float:
    (section, _, leaf), (its_section, _, its_leaf) = wanted.rpartition("."), name.rpartition(".")
    shared = set(leaf.split("_")) & set(its_leaf.split("_"))
    away = 0.0 if section == its_section else 0.4 * (1 - difflib.SequenceMatcher(None, section, its_section).ratio())
    return difflib.SequenceMatcher(None, leaf, its_leaf).ratio() + (0.5 if shared else 0.0) - away


def _filled(name: str, wanted: str) -> str:
    """`name` with the names that the user has chosen in place of `NAME`."""
    given = wanted.split(".")
    return ".".join(given[at] if part == ANY and at < len(given) else part for at, part in enumerate(name.split(".")))


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _kind(info: FieldInfo) -> str:
    kind = _kind_of(info.annotation)
    bounds = _bounds(info.metadata)
    if not bounds:
        return kind
    return kind.removesuffix(" or null") + bounds + (" or null" if kind.endswith(" or null") else "")


def _kind_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind_of(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return _choice([str(value) for value in arguments])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _kind_of(part) for part in arguments)
    if origin is tuple:
        return f"list of {'' if arguments[-1] is Ellipsis else f'{len(arguments)} x '}{_kind_of(arguments[0])}"
    if origin is dict:
        inner = arguments[1]
        return f"{ANY}: {'settings' if _model(inner) else _kind_of(inner)}"
    return TYPES[annotation]


def _choice(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _bounds(metadata: Iterable[Any]) -> str:
    limits = [limit for one in metadata for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
    return " and".join(f" {sign} {getattr(limit, bound):g}" for limit in limits for bound, sign in BOUNDS.items()
                       if getattr(limit, bound, None) is not None)


def _text(value: Any) -> str:
    """A default as YAML has it."""
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(value)}}}"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
