"""As much of msgspec as the engine's value types use, in plain Python, for machines that do not have it.

`install` puts it in msgspec's place when that cannot be imported, and does nothing otherwise. Values are
built and converted, hardly checked: what it is for reads only files that Drift wrote. No sockets: frames
cannot be packed.
"""

from __future__ import annotations

import copy
import enum
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any


class MsgspecError(Exception):
    """What msgspec's errors are."""


class DecodeError(MsgspecError):
    """Not JSON."""


class ValidationError(DecodeError):
    """JSON of another shape."""


class Meta:
    """Bounds, remembered and not enforced."""

    def __init__(self, **bounds: Any) -> None:
        self.bounds = bounds


_NOTHING: Any = object()


class _Field:
    def __init__(self, default: Any = _NOTHING, default_factory: Callable[[], Any] | None = None) -> None:
        self.default, self.default_factory = default, default_factory


def field(
    *, default: Any = _NOTHING, default_factory: Callable[[], Any] | None = None, name: Any = None
) -> Any:
    """A field with a default."""
    return _Field(default, default_factory)


class Struct:
    """Fields from annotations, an initialiser, equality, and nothing more."""

    __struct_fields__: tuple[str, ...] = ()
    __struct_defaults__: Mapping[str, Any] = {}
    __struct_tag__: str | None = None

    def __init_subclass__(cls, tag: Any = None, **options: Any) -> None:
        super().__init_subclass__()
        names = list(cls.__struct_fields__)
        defaults = dict(cls.__struct_defaults__)
        for name, kind in inspect.get_annotations(cls).items():
            if "ClassVar" in str(kind):
                continue
            if name not in names:
                names.append(name)
            if name in cls.__dict__:
                defaults[name] = cls.__dict__[name]
        cls.__struct_fields__, cls.__struct_defaults__ = tuple(names), defaults
        cls.__struct_tag__ = tag if isinstance(tag, str) else None
        cls.__match_args__ = tuple(names)

    def __init__(self, *given: Any, **named: Any) -> None:
        values = dict(zip(self.__struct_fields__, given, strict=False)) | named
        for name in self.__struct_fields__:
            if name not in values:
                values[name] = self._default(name)
        for name, value in values.items():
            if name not in self.__struct_fields__:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            object.__setattr__(self, name, value)
        after = getattr(self, "__post_init__", None)
        if after is not None:
            after()

    @classmethod
    def _default(cls, name: str) -> Any:
        if name not in cls.__struct_defaults__:
            raise TypeError(f"{cls.__name__} needs field {name!r}")
        default = cls.__struct_defaults__[name]
        if isinstance(default, _Field):
            return default.default_factory() if default.default_factory else default.default
        return copy.copy(default)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(tuple(_values(self).values()))

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in _values(self).items())
        return f"{type(self).__name__}({inside})"


def _values(struct: Struct) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def replace(struct: Any, **changes: Any) -> Any:
    """A copy with other values."""
    return type(struct)(**(_values(struct) | changes))


def force_setattr(struct: Any, name: str, value: Any) -> None:
    """Set a field of a frozen one."""
    object.__setattr__(struct, name, value)


class FieldInfo:
    """What is known of a struct's field; its type as it was written."""

    def __init__(self, struct: type[Struct], name: str) -> None:
        default = struct.__struct_defaults__.get(name, _NOTHING)
        self.name = name
        self.type = next(
            kind
            for each in struct.__mro__
            for key, kind in inspect.get_annotations(each).items()
            if key == name
        )
        self.required = default is _NOTHING
        made = isinstance(default, _Field)
        self.default = default.default if made else default
        self.default_factory = default.default_factory if made else None


def fields(struct: type[Struct]) -> tuple[FieldInfo, ...]:
    """A struct's, in order."""
    return tuple(FieldInfo(struct, name) for name in struct.__struct_fields__)


def defstruct(name: str, fields: Iterable[Any], **options: Any) -> type[Struct]:
    """A struct of fields (name, type) or (name, type, default)."""
    rows = [(each, Any) if isinstance(each, str) else each for each in fields]
    body: dict[str, Any] = {row[0]: row[2] for row in rows if len(row) > 2}
    body["__annotations__"] = {row[0]: row[1] for row in rows}
    return types.new_class(name, (Struct,), {"tag": options.get("tag")}, lambda space: space.update(body))


def to_builtins(value: Any, **options: Any) -> Any:
    """Structs to mappings, all the way down."""
    if isinstance(value, Struct):
        return {name: to_builtins(each) for name, each in _values(value).items()}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_builtins(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_builtins(each) for each in value]
    return value


def convert(value: Any, type: Any = Any, **options: Any) -> Any:
    """A value of a type from plain data. Raises ValidationError."""
    try:
        return _build(value, type)
    except (TypeError, ValueError, KeyError) as error:
        raise ValidationError(str(error)) from error


def _build(value: Any, kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        unknown = [name for name in value if name not in kind.__struct_fields__]
        if unknown:
            raise ValueError(f"Object contains unknown field `{unknown[0]}`")
        return kind(**{name: _build(each, hints[name]) for name, each in value.items()})
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _build(value, inside[0])
    if origin in (typing.Union, types.UnionType):
        rest = [each for each in inside if each is not type(None)]
        return value if value is None or len(rest) != 1 else _build(value, rest[0])
    if origin is tuple:
        each = inside[:1] * len(value) if inside[1:] == (...,) else inside
        return tuple(_build(one, what) for one, what in zip(value, each, strict=True))
    if origin is list:
        return [_build(one, inside[0]) for one in value]
    if origin is dict:
        return {_build(key, inside[0]): _build(one, inside[1]) for key, one in value.items()}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    return float(value) if kind is float and isinstance(value, int) else value


def encode_json(value: Any, **options: Any) -> bytes:
    """JSON."""
    return json.dumps(to_builtins(value), separators=(",", ":")).encode()


def decode_json(data: Any, *, type: Any = Any, **options: Any) -> Any:
    """From JSON. Raises DecodeError, ValidationError."""
    try:
        plain = json.loads(data)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    return convert(plain, type)


class _JsonEncoder:
    def __init__(self, **options: Any) -> None:
        self._hook = options.get("enc_hook")

    def encode(self, value: Any) -> bytes:
        return json.dumps(to_builtins(value), default=self._hook, separators=(",", ":")).encode()


class _Decoder:
    def __init__(self, type: Any = Any, **options: Any) -> None:
        self.type = type

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def decode(self, data: Any) -> Any:
        return decode_json(data, type=self.type)


class _NoPacking:
    def __init__(self, *given: Any, **options: Any) -> None:
        return

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def encode(self, value: Any) -> bytes:
        raise RuntimeError("frames need msgspec, which is not installed")

    decode = encode


def module() -> types.ModuleType:
    """A stand-in for `msgspec`."""
    made = types.ModuleType("msgspec", __doc__)
    parts: dict[str, Any] = {
        "Struct": Struct, "Meta": Meta, "field": field, "convert": convert, "to_builtins": to_builtins,
        "MsgspecError": MsgspecError, "DecodeError": DecodeError, "ValidationError": ValidationError,
        "structs": types.SimpleNamespace(
            replace=replace, force_setattr=force_setattr, fields=fields, FieldInfo=FieldInfo
        ),
        "defstruct": defstruct, "NODEFAULT": _NOTHING, "Raw": bytes,
        "json": types.SimpleNamespace(encode=encode_json, decode=decode_json, Encoder=_JsonEncoder, Decoder=_Decoder),
        "msgpack": types.SimpleNamespace(Encoder=_NoPacking, Decoder=_NoPacking),
    }  # fmt: skip
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def install() -> bool:
    """Whether the stand-in is used."""
    if "msgspec" not in sys.modules and find_spec("msgspec") is None:
        sys.modules["msgspec"] = module()
    return not hasattr(sys.modules.get("msgspec"), "__version__") and "msgspec" in sys.modules
