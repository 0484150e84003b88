"""Settings dataclasses as ROS parameters: one parameter for each field, `inner.field` for a dataclass in a dataclass.

A field's metadata may hold `about` (the description) and `range` (closed; ROS then refuses other values).
"""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment

KINDS = {
    bool: Parameter.Type.BOOL,
    int: Parameter.Type.INTEGER,
    float: Parameter.Type.DOUBLE,
    str: Parameter.Type.STRING,
    list[float]: Parameter.Type.DOUBLE_ARRAY,
    list[str]: Parameter.Type.STRING_ARRAY,
}


def declare[Config](node: Node, schema: type[Config], prefix: str = "", writable: tuple[str, ...] = ()) -> Config:
    """Declare every field and return the dataclass that the parameters make. Raises ValueError naming the parameter.

    Parameters are read-only after the start, but for those in `writable`, whose node has to listen.
    """
    values, hints = {}, get_type_hints(schema)
    defaults = schema()
    for field in dataclasses.fields(schema):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            values[field.name] = declare(node, kind, f"{name}.", writable)
        else:
            default, read_only = getattr(defaults, field.name), name not in writable
            values[field.name] = _value(node, name, kind, default, field.metadata, read_only)
    return schema(**values)


def declare_embodiment(node: Node) -> Embodiment:
    """The parameter `embodiment`: a name in configs/embodiment/, or a path of a contract (.json)."""
    about = "embodiment contract: a name in configs/embodiment, or the path of a contract.json"
    return load_embodiment(_value(node, "embodiment", str, "fr3_tabletop", {"about": about}, True))


def load_embodiment(name: str) -> Embodiment:
    if name.endswith(".json"):
        return Embodiment.load(Path(name))
    path = CONFIG_DIR / "embodiment" / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ValueError(f"embodiment {name!r}: neither a .json file nor one of {known}")
    return Embodiment.from_dict(yaml.safe_load(path.read_text()))


def _value(node: Node, name: str, kind: Any, default: Any, metadata: Any, read_only: bool) -> Any:
    assert kind in KINDS, f"{name}: no ROS parameter type for {kind}"
    descriptor = ParameterDescriptor(description=metadata.get("about", ""), read_only=read_only)
    if between := metadata.get("range"):
        if kind is int:
            descriptor.integer_range = [IntegerRange(from_value=int(between[0]), to_value=int(between[1]), step=0)]
        else:
            low, high = map(float, between)
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
    is_empty_list = get_origin(kind) is list and not default
    try:  # the type of an empty list cannot be told, so it is declared by type and left unset
        given = node.declare_parameter(name, KINDS[kind] if is_empty_list else default, descriptor).value
    except InvalidParameterTypeException as error:
        raise ValueError(f"parameter {name}: {error}; a {_words(kind)} is needed") from error
    except InvalidParameterValueException as error:
        allowed = f"; allowed are {between[0]} to {between[1]}" if between else ""
        raise ValueError(f"parameter {name}: {error}{allowed}") from error
    return list(given or []) if get_origin(kind) is list else given


def _words(kind: Any) -> str:
    names = {bool: "bool", int: "whole number", float: "number with a decimal point", str: "string"}
    return f"list of {names[get_args(kind)[0]]}s" if get_origin(kind) is list else names[kind]
