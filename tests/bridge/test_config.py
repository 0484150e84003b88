from dataclasses import dataclass, field

import pytest

from bridge import config
from bridge.embodiment import Embodiment


@dataclass
class Schema:
    embodiment: Embodiment = field(default_factory=Embodiment)
    steps: int = 3


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    (tmp_path / "thing.yaml").write_text("defaults:\n  - embodiment: fr3_tabletop\n  - _self_\n")
    (tmp_path / "embodiment").symlink_to(config.CONFIG_DIR / "embodiment")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)


def test_values_groups_and_mappings():
    loaded = config.load("thing", Schema, ["steps=5", "embodiment.cameras.wrist.fx=300"])
    assert loaded.steps == 5
    assert isinstance(loaded.embodiment, Embodiment)
    assert loaded.embodiment.cameras["wrist"].fx == 300
    assert loaded.embodiment.cameras["third_person"].fx == 604


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=4", "unknown key 'stpes'. Did you mean 'steps'"),
        ("steps=many", "steps"),
        ("steps", "key=value"),
        ("+steps=4", "key=value"),
        ("embodiment=fr4_tabletop", "fr4_tabletop"),
        ("embodiment.cameras.wrist.fxx=3", "fxx"),
        ("embodiment.policy_rate_hz=500", "allowed are 1 to 50"),
    ],
)
def test_bad_override_names_the_key(override, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        config.load("thing", Schema, [override])


def test_help_lists_keys_and_exits_zero(capsys):
    with pytest.raises(SystemExit) as exit_:
        config.command_line("thing", Schema, ["--help"], "About.")
    assert not exit_.value.code
    assert "steps: 3" in capsys.readouterr().out


def test_save_and_reload(tmp_path):
    config.save(config.load("thing", Schema, ["steps=7"]), tmp_path / "out" / "thing.yaml")
    assert "steps: 7" in (tmp_path / "out" / "thing.yaml").read_text()
