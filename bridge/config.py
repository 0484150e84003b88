"""Hydra chooses, dataclasses mean: from command line to one checked dataclass, and nobody sees a DictConfig after.

`load("sft", SftConfig, ["steps=10"])` composes `configs/sft.yaml`, lays it over the dataclass and returns an instance.
A key that neither knows is a ValueError with a suggestion.
"""

import difflib
import sys
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
Config = TypeVar("Config")


def load(name: str, schema: type[Config], overrides: list[str] | None = None) -> Config:
    """Raises ValueError for an unknown key, a wrong type or a bad value, naming key, value and what was allowed."""
    keys = leaf_keys(OmegaConf.structured(schema))
    groups = sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir())
    for override in overrides or []:
        key = override.split("=", 1)[0].lstrip("+~")
        if "=" not in override:
            raise ValueError(f"{override!r}: overrides look like key=value")
        if override.startswith(("+", "~")):
            raise ValueError(f"{override!r}: keys cannot be added or removed, only set (key=value)")
        if key not in keys and key not in groups and not any(k.startswith(key + ".") or _free(key, keys) for k in keys):
            near = difflib.get_close_matches(key, keys + groups, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"{name}: unknown key {key!r}.{hint}")
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose(name, overrides=list(overrides or []))
        OmegaConf.set_struct(composed, False)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))
    except (HydraException, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None)
        near = difflib.get_close_matches(str(key), keys, n=3, cutoff=0.5) if key else []
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{name}: {str(error).splitlines()[0]}{hint}") from error


def command_line(name: str, schema: type[Config], argv: list[str], about: str) -> Config:
    """`load` for entry points: prints help or a one-line error and exits instead of raising."""
    if "-h" in argv or "--help" in argv:
        print(f"usage: cotwin {name} [key=value ...]\n\n{(about or '').strip()}\n\nkeys and defaults:")
        print("\n".join(f"  {line}" for line in OmegaConf.to_yaml(OmegaConf.structured(load(name, schema))).splitlines()))
        sys.exit(0)
    try:
        return load(name, schema, argv)
    except ValueError as error:
        sys.exit(f"error: {error}")


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


def _free(key: str, keys: list[str]) -> bool:
    """Keys inside a free mapping (dict-typed field, e.g. `embodiment.cameras.wrist.fx`) are checked when merging."""
    parent = key.rsplit(".", 1)[0]
    while parent != key:
        if parent in keys and not any(k.startswith(parent + ".") for k in keys):
            return True
        key, parent = parent, parent.rsplit(".", 1)[0]
    return False


