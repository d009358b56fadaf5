"""Every field of an experiment as a command-line flag, and as JSON.

Fields of an experiment are often typed by protocols (a method, a distance, a dataset), so flags are read from the
default instance and not from the types: `--method.intervals 20` exists because the experiment's method has intervals.
"""

import dataclasses
import difflib
import functools
import hashlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np

T = TypeVar("T")

_PLAIN = (bool, int, float, str, Path, types.NoneType)
_LONGEST = 16  # a table of a thousand betas is not a flag


def override(config: T, flags: Sequence[str], prog: str) -> T:
    """The dataclass `config` with fields replaced by flags such as `--optimizer.learning-rate 3e-4`.

    Numbers, strings, booleans (--x, --no-x) and tuples of them can be set, however deep; functions and arrays stay.
    Raises ValueError for the flag of an unknown field or of one that only the file sets. Prints a message and exits
    with status 2 for a value of another type; prints all flags and exits for --help.
    """
    import tyro

    for flag in flags:
        if flag.startswith("--") and flag != "--help":
            _check_flag(config, flag.partition("=")[0])
    mirror = _mirror(config)
    about = (
        f"{mirror.__doc__}\n\nFor --workdir and all that is not of the experiment: {' '.join(prog.split()[:2])} --help"
    )
    made = tyro.cli(
        type(mirror), default=mirror, args=list(flags), prog=prog, description=about, config=(tyro.conf.SuppressFixed,)
    )  # fmt: skip
    return _apply(config, made)


def _check_flag(config: Any, flag: str) -> None:
    """Raise ValueError unless the flag is of a field that it can set."""
    at, hint, path = config, None, flag[2:].replace("-", "_").split(".")
    for i, name in enumerate(path):
        names = [f.name for f in _fields(at)] if dataclasses.is_dataclass(at) and not isinstance(at, type) else []
        name = name[3:] if name.startswith("no_") and name[3:] in names else name
        if name not in names:
            near, of = difflib.get_close_matches(name, names, 1), ".".join(path[:i]) or "the experiment"
            shown = f", did you mean {near[0]}?" if near else f"; it has {', '.join(names)}" if names else ""
            raise ValueError(f"{flag}: {of} has no field {name}{shown}".replace("_", "-"))
        hint, at = _hints(type(at)).get(name), getattr(at, name)
    if _plain_type(hint, at) is None:
        inner = _fields(at) if dataclasses.is_dataclass(at) and not isinstance(at, type) else []
        more = f"; its own fields are flags, {flag}.{inner[0].name.replace('_', '-')} for example" if inner else ""
        raise ValueError(f"{flag} is set in the experiment's file{more}")


def describe(value: Any) -> Any:
    """A value as JSON: dataclasses as objects with their "type", functions by name, arrays by shape and digest."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": _name(type(value)), **{f.name: describe(getattr(value, f.name)) for f in _fields(value)}}
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
        return {"type": "functools.partial", **describe(parts)}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, _PLAIN):
        return value
    if hasattr(value, "__array__"):
        array = np.ascontiguousarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        return f"{array.dtype}{list(array.shape)} sha256:{digest}"
    return _name(value)


def differences(before: Any, after: Any, path: str = "", *, absent: bool = True) -> list[str]:
    """Lines "optimizer.learning_rate: 0.001 before, 0.01 now" for all that differs between two described values.

    absent: whether what one of them lacks counts, such as a field of a later version.
    """
    if isinstance(before, dict) and isinstance(after, dict) and before.get("type") == after.get("type"):
        names = [*before, *(n for n in after if n not in before)]
        return [
            line
            for n in (names if absent else [n for n in before if n in after])
            for line in differences(
                before.get(n, "absent"), after.get(n, "absent"), f"{path}.{n}".lstrip("."), absent=absent
            )
        ]
    return [] if before == after else [f"{path}: {_short(before)} before, {_short(after)} now"]


def _short(value: Any) -> str:
    return value["type"] if isinstance(value, dict) and "type" in value else str(value)


def _fields(config) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(config) if f.init]


def _mirror(config: Any) -> Any:
    """An instance of a new dataclass whose fields have the types of config's values; the fixed ones hold a name."""
    import tyro

    hints, words = _hints(type(config)), _words(type(config))
    fields: list[tuple[str, Any, Any]] = []
    for field in _fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and _fields(value):
            inner = _mirror(value)
            fields.append((field.name, type(inner), dataclasses.field(default=inner)))
        elif (kind := _plain_type(hints.get(field.name), value)) is not None:
            kind = Annotated[kind, tyro.conf.arg(help=words[field.name])] if field.name in words else kind
            fields.append((field.name, kind, dataclasses.field(default=value)))
        else:
            shown = str(describe(value)) if not dataclasses.is_dataclass(value) else _name(type(value))
            fields.append((field.name, tyro.conf.Fixed[str], dataclasses.field(default=shown)))
    made = dataclasses.make_dataclass(type(config).__name__, fields, frozen=True)
    made.__doc__ = (type(config).__doc__ or type(config).__name__).split("\n")[0]
    return made()


def _words(kind: type) -> dict[str, str]:
    """What a class's docstring says of its fields, as "name: words.", up to the end of the sentence."""
    names = "|".join(field.name for field in dataclasses.fields(kind))
    parts = re.split(rf"(?<=\. )((?:{names})(?:, (?:{names}))*): ", " ".join((kind.__doc__ or "").split()))
    said = zip(parts[1::2], parts[2::2], strict=True)
    return {name: re.split(r"(?<=\.) (?=[A-Z])", text.strip())[0] for given, text in said for name in given.split(", ")}


def _apply(config: Any, mirror: Any) -> Any:
    """`config` with the values of its mirror."""
    changes = {}
    for field in _fields(mirror):
        old, new = getattr(config, field.name), getattr(mirror, field.name)
        if dataclasses.is_dataclass(new):
            new = _apply(old, new)
            if new is not old:
                changes[field.name] = new
        elif _plain_type(_hints(type(config)).get(field.name), old) is not None and new != old:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config


def _plain_type(hint: Any, value: Any) -> Any:
    """The type that a flag for this field is read as, or None where it cannot be one."""
    if isinstance(value, tuple | list):
        if len(value) > _LONGEST or not all(isinstance(v, _PLAIN) for v in value):
            return None
        return hint if _is_plain(hint) else tuple[tuple(type(v) for v in value)] if value else None  # type: ignore[misc]
    if not isinstance(value, _PLAIN):
        return None
    if _is_plain(hint):
        return hint
    return None if value is None else type(value)


def _is_plain(hint: Any) -> bool:
    if hint in _PLAIN or hint is None or hint is Ellipsis:
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return True
    return origin in (typing.Union, types.UnionType, tuple, list) and all(_is_plain(p) for p in parts)


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError):  # a name that exists only for type checkers: the values' own types will do
        return {}


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    module = named.__module__
    # Classes of an experiment file: its copy in the run's folder has another name and gives the same experiment.
    return f"{'experiment' if module.startswith('ddistill_experiment_') else module}.{named.__qualname__}"
