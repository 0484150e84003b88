"""Launch files in ROS 2's YAML frontend, read without ROS's launch packages.

A subset: `arg`, `let`, `set_env`, `node`, `executable`, `include`, `group`, `push_ros_namespace`; the substitutions
`$(var x)`, `$(env X default)`, `$(dirname)` and `$(not x)`; `if` and `unless`. What lies outside is refused by name, so
that a file never means one thing here and another under `ros2 launch`.
"""

import difflib
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "robot"
EXECUTABLES = {
    "arm_node": "robot.arm_node",
    "camera_node": "robot.camera_node",
    "runtime_node": "robot.runtime_node",
    "recorder_node": "robot.recorder_node",
    "expert_node": "sim.stand_in.expert_node",
}
CONDITIONS = {"if", "unless"}
KEYS = {
    "arg": {"name", "default", "description", "choice"} | CONDITIONS,
    "let": {"name", "value"} | CONDITIONS,
    "set_env": {"name", "value"} | CONDITIONS,
    "push_ros_namespace": {"namespace"} | CONDITIONS,
    "include": {"file", "arg"} | CONDITIONS,
    "group": {"scoped", "children"} | CONDITIONS,
    "node": {"pkg", "exec", "name", "namespace", "args", "param", "remap", "env", "output", "respawn", "respawn_delay"}
    | CONDITIONS,
    "executable": {"cmd", "name", "cwd", "env", "output", "respawn", "respawn_delay"} | CONDITIONS,
}
SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")


@dataclass
class Process:
    """One program to run. `name` labels its output."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    respawn: bool = False
    respawn_delay_s: float = 0.0


@dataclass
class Argument:
    name: str
    default: str | None
    description: str
    choices: list[str]


@dataclass
class _Scope:
    """What substitutions see, and what nodes inherit."""

    file: Path
    given: dict[str, str]
    values: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    namespace: str = ""

    def inner(self) -> "_Scope":
        return _Scope(self.file, self.given, dict(self.values), dict(self.env), self.namespace)


def find(file: str | Path) -> Path:
    """As given, else below the project's own folder. Raises ValueError."""
    for path in (Path(file), ROOT / file):
        if path.is_file():
            return path.resolve()
    known = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.launch.yaml"))
    raise ValueError(f"no launch file {file}; there are {known}")


def processes(file: str | Path, args: dict[str, str] | None = None) -> list[Process]:
    """What a launch file starts, in its order. Raises ValueError naming file, key or argument."""
    path, args = find(file), dict(args or {})
    known = {argument.name: argument for argument in arguments(path)}
    for name in args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" It has {sorted(known)}."
            raise ValueError(f"{path.name}: unknown argument {name!r}.{hint}")
    out: list[Process] = []
    _run(_entities(path), _Scope(path, args), out)
    names = [process.name for process in out]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path.name}: two programs are called {twice}: give them a name or a namespace")
    return out


def arguments(file: str | Path) -> list[Argument]:
    """The arguments that a file declares at its top level."""
    out = []
    for kind, body in _entities(find(file)):
        if kind == "arg":
            choices = [str(choice["value"]) for choice in body.get("choice", [])]
            default = None if "default" not in body else _text(body["default"])
            out.append(Argument(body["name"], default, body.get("description", ""), choices))
    return out


def _entities(path: Path) -> list[tuple[str, Any]]:
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or set(content) != {"launch"}:
        raise ValueError(f"{path.name}: a launch file has the one key 'launch'")
    return _checked(content["launch"], path)


def _checked(items: Any, path: Path) -> list[tuple[str, Any]]:
    """Each item as (kind, body), with known keys."""
    out = []
    for item in items or []:
        if not isinstance(item, dict) or len(item) != 1:
            raise ValueError(f"{path.name}: {item!r} is not one action with its keys")
        ((kind, body),) = item.items()
        if kind not in KEYS:
            raise ValueError(f"{path.name}: unknown action {kind!r}; known are {sorted(KEYS)}")
        if kind == "group" and isinstance(body, list):
            body = {"children": body}
        if unknown := sorted(set(body) - KEYS[kind]):
            raise ValueError(f"{path.name}: {kind} does not know {unknown}; allowed are {sorted(KEYS[kind])}")
        out.append((kind, body))
    return out


def _run(entities: list[tuple[str, Any]], scope: _Scope, out: list[Process]) -> None:
    for kind, body in entities:
        if _holds(body, scope):
            HANDLERS[kind](body, scope, out)


def _arg(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    name = body["name"]
    if name in scope.given:
        value = scope.given[name]
    elif "default" in body:
        value = _substitute(body["default"], scope)
    else:
        raise ValueError(f"{scope.file.name}: argument {name!r} is needed: {body.get('description', 'no default')}")
    choices = [str(choice["value"]) for choice in body.get("choice", [])]
    if choices and value not in choices:
        raise ValueError(f"{scope.file.name}: {name}:={value}: allowed are {choices}")
    scope.values[name] = value


def _let(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    scope.values[body["name"]] = _substitute(body["value"], scope)


def _set_env(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    scope.env[body["name"]] = _substitute(body["value"], scope)


def _push_namespace(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    scope.namespace = _join(scope.namespace, _substitute(body["namespace"], scope))


def _group(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    scoped = body.get("scoped", True)
    _run(_checked(body["children"], scope.file), scope.inner() if scoped else scope, out)


def _include(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    path = Path(_substitute(body["file"], scope))
    if not path.is_file():
        raise ValueError(f"{scope.file.name}: include: no file {path}")
    given = {arg["name"]: _substitute(arg["value"], scope) for arg in body.get("arg", [])}
    # As under ROS: an included file sees the values of the file that includes it.
    inner = _Scope(path, {**scope.values, **given}, dict(scope.values), dict(scope.env), scope.namespace)
    _run(_entities(path), inner, out)


def _node(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    package, executable = body["pkg"], body["exec"]
    if package != PACKAGE or executable not in EXECUTABLES:
        raise ValueError(
            f"{scope.file.name}: node {package}/{executable}: known are {sorted(EXECUTABLES)} of {PACKAGE}"
        )
    name = _substitute(body.get("name", executable), scope)
    namespace = _join(scope.namespace, _substitute(body.get("namespace", ""), scope))
    command = [sys.executable, "-m", EXECUTABLES[executable], *shlex.split(_substitute(body.get("args", ""), scope))]
    command += ["--ros-args", "-r", f"__node:={name}"]
    if namespace:
        command += ["-r", f"__ns:={namespace}"]
    for param in body.get("param", []):
        if "from" in param:
            command += ["--params-file", _substitute(param["from"], scope)]
        else:
            command += ["-p", f"{param['name']}:={_parameter(param, scope)}"]
    for remap in body.get("remap", []):
        command += ["-r", f"{_substitute(remap['from'], scope)}:={_substitute(remap['to'], scope)}"]
    out.append(_process(body, scope, _join(namespace, name).lstrip("/"), command))


def _executable(body: dict[str, Any], scope: _Scope, out: list[Process]) -> None:
    command = shlex.split(_substitute(body["cmd"], scope))
    name = _substitute(body.get("name", Path(command[0]).name), scope)
    if command[0] == "cotwin":  # the one that belongs to this interpreter, whatever PATH says
        command[:1] = [sys.executable, "-m", "cotwin"]
    out.append(_process(body, scope, _join(scope.namespace, name).lstrip("/"), command))


def _process(body: dict[str, Any], scope: _Scope, name: str, command: list[str]) -> Process:
    env = scope.env | {e["name"]: _substitute(e["value"], scope) for e in body.get("env", [])}
    cwd = _substitute(body["cwd"], scope) if "cwd" in body else None
    respawn = _truth(_substitute(body.get("respawn", False), scope), "respawn")
    return Process(name, command, env, cwd, respawn, float(body.get("respawn_delay", 0.0)))


HANDLERS = {
    "arg": _arg,
    "let": _let,
    "set_env": _set_env,
    "push_ros_namespace": _push_namespace,
    "group": _group,
    "include": _include,
    "node": _node,
    "executable": _executable,
}


def _holds(body: dict[str, Any], scope: _Scope) -> bool:
    if "if" in body and not _truth(_substitute(body["if"], scope), "if"):
        return False
    return "unless" not in body or not _truth(_substitute(body["unless"], scope), "unless")


def _truth(text: str, where: str) -> bool:
    if text.strip().lower() in ("true", "1"):
        return True
    if text.strip().lower() in ("false", "0"):
        return False
    raise ValueError(f"{where}: {text!r} is neither true nor false")


def _parameter(param: dict[str, Any], scope: _Scope) -> str:
    """The value as `-p` wants it. As under ROS, text is read as YAML unless `type: str` says otherwise."""
    value = param["value"]
    if isinstance(value, str):
        value = _substitute(value, scope)
        if param.get("type") != "str" and value != "":
            value = yaml.safe_load(value)
    return json.dumps(value)


def _substitute(value: Any, scope: _Scope) -> str:
    """Text with its substitutions carried out, the innermost first."""
    text = _text(value)
    while match := SUBSTITUTION.search(text):
        text = text[: match.start()] + _evaluate(match[1].strip(), scope) + text[match.end() :]
    return text


def _evaluate(expression: str, scope: _Scope) -> str:
    kind, _, rest = expression.partition(" ")
    rest = rest.strip()
    if kind == "var":
        if rest not in scope.values:
            raise ValueError(f"{scope.file.name}: $(var {rest}): no such argument before this line")
        return scope.values[rest]
    if kind == "env":
        name, _, default = rest.partition(" ")
        if name not in os.environ and not default:
            raise ValueError(f"{scope.file.name}: $(env {name}): not set, and no default given")
        return os.environ.get(name, default.strip().strip("'\""))
    if kind == "dirname":
        return str(scope.file.parent)
    if kind == "not":
        return str(not _truth(rest, "$(not)")).lower()
    raise ValueError(f"{scope.file.name}: unknown substitution $({expression}); known are var, env, dirname and not")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _join(namespace: str, name: str) -> str:
    if name.startswith("/") or not namespace:
        return name if name.startswith("/") or not name else f"/{name}"
    return f"{namespace}/{name}" if name else namespace
