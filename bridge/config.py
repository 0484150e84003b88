"""Hydra chooses, dataclasses mean: from command line to one checked dataclass, and nobody sees a DictConfig after.

`load("sft", SftConfig, ["steps=10"])` composes `configs/sft.yaml`, lays it over the dataclass and returns an instance.
A key that neither knows is a ValueError with a suggestion.
"""

import difflib
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridge.errors import BridgeError

Main = Callable[[list[str]], int]
CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


def load[Config](
    name: str, schema: type[Config], overrides: list[str] | None = None, values: Mapping[str, Any] | None = None
) -> Config:
    """`values`: dotted keys that lie over the YAML and below the overrides.

    Raises ValueError for an unknown key, a wrong type or a bad value, naming key, value and what was allowed."""
    defaults = OmegaConf.structured(schema)
    keys = leaf_keys(defaults)
    groups = sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir())
    choices, settings = [], []
    for text in overrides or []:
        if "=" not in text or text.startswith(("+", "~")):
            raise ValueError(f"{name}: {text!r}: overrides look like key=value; keys are neither added nor removed")
        key = text.split("=", 1)[0]
        if key in groups:
            choices.append(text)
        elif key in keys or _inside_mapping(key, keys):
            settings.append(text)
        else:
            raise ValueError(f"{name}: unknown key {key!r}.{did_you_mean(key, keys + groups)}")
    try:
        config = OmegaConf.merge(defaults, compose_files(CONFIG_DIR, name, *choices))
        for key, value in (values or {}).items():
            OmegaConf.update(config, key, value, force_add=_inside_mapping(key, keys))
        for setting in OverridesParser.create().parse_overrides(settings):
            OmegaConf.update(config, setting.key_or_group, setting.value())
        return cast(Config, OmegaConf.to_object(config))
    except (HydraException, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None)
        hint = did_you_mean(str(key), keys) if key and key not in keys else ""
        where = f" (key {key!r})" if key else ""
        raise ValueError(f"{name}: {str(error).splitlines()[0]}{where}{hint}") from error


@functools.cache
def compose_files(folder: Path, name: str, *choices: str) -> DictConfig:
    """What the files in `folder` say, read once in a process; for reading only. Raises Hydra's errors."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        composed = compose(name, overrides=list(choices))
    OmegaConf.set_struct(composed, False)
    return composed


def command_line[Config](name: str, schema: type[Config], argv: list[str], about: str) -> Config:
    """`load` for entry points: prints help or a one-line error and exits instead of raising."""
    asked = [text for text in argv if text not in ("-h", "--help")]
    try:
        config = load(name, schema, asked)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if asked != argv:
        print(f"usage: cotwin {name} [key=value ...]\n\n{(about or '').strip()}\n\nkeys and values:")
        print("\n".join(f"  {line}" for line in OmegaConf.to_yaml(OmegaConf.structured(config)).splitlines()))
        sys.exit(0)
    return config


def errors_in_one_line(*more: type[Exception]) -> Callable[[Main], Main]:
    """For a command's `main`: ValueError, BridgeError and `more` end it with one line and status 1, not a traceback."""

    def wrap(main: Main) -> Main:
        @functools.wraps(main)
        def told(argv: list[str]) -> int:
            try:
                return main(argv)
            except (ValueError, BridgeError, *more) as error:
                print(f"error: {error}", file=sys.stderr)
                return 1

        return told

    return wrap


def save(config: Any, path: Path) -> None:
    """Write a config dataclass as YAML, so that a run can be read and repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def leaf_keys(node: Any, prefix: str = "") -> list[str]:
    """Dotted names of all keys, inner ones included."""
    found = []
    for key in node:
        dotted = f"{prefix}.{key}" if prefix else str(key)
        found.append(dotted)
        child = node._get_node(key)
        if OmegaConf.is_dict(child) and not child._is_none() and not child._is_missing():
            found += leaf_keys(child, dotted)
    return found


def did_you_mean(key: str, known: list[str]) -> str:
    """ " Did you mean ...?", or nothing when no name is near."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _inside_mapping(key: str, keys: list[str]) -> bool:
    """Whether `key` lies in a dict-typed field (`embodiment.cameras.wrist.fx`), whose names the schema cannot list."""
    parents = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
    return any(p in keys and not any(k.startswith(p + ".") for k in keys) for p in parents)
