import dataclasses
import json

import numpy as np
import pytest
import yaml

from bridge import pose
from bridge.config import load
from bridge.dataset import DatasetStore, EpisodeWriter
from sim.twin.command import TwinCommandConfig, fit_dynamics, main
from sim.twin.config import TwinConfig
from sim.twin.replay import Recording, composed, error_m, fit, recordings, replay
from sim.twin.worker import Twin

TRUE = {"arm_stiffness": 400.0, "arm_damping": 90.0, "latency_s": 0.03}  # of the recorded arm
DRIVES = TwinConfig(arm_follows="drives", arm_stiffness=1000.0, arm_damping=75.0)


@pytest.fixture(scope="module")
def other_arm(embodiment) -> Twin:
    """A softer and later arm: what is recorded. A stand-in for a robot's recordings, made by the twin itself."""
    return Twin(dataclasses.replace(DRIVES, **TRUE, home_noise_rad=0.0), embodiment, render=False)


@pytest.fixture(scope="module")
def ours(embodiment) -> Twin:
    return Twin(DRIVES, embodiment, render=False)


@pytest.fixture(scope="module")
def data(other_arm, embodiment, tmp_path_factory):
    """Two short episodes at the policy rate, written as a data set."""
    root = tmp_path_factory.mktemp("recorded")
    store = DatasetStore.create(root / "data", "test/recorded", embodiment, 10, (8, 8))
    pictures = {name: np.zeros((8, 8, 3), np.uint8) for name in embodiment.cameras}
    for seed in range(2):
        writer = EpisodeWriter(root / f"{seed}", embodiment, 10, embodiment.instructions[0], "stand_in", (8, 8))
        other_arm.env.bare = True
        other_arm.reset(seed)
        rng = np.random.default_rng(seed)
        for step in range(14):
            aim = 0.03 * np.sin(0.5 * step + rng.uniform(0, 0.3, 3) + [seed, 1, 2])
            action = np.float32([*aim, 0.02 * np.sin(step), 0, 0, 1.0])
            row = {"observation.state": other_arm.state, "action": action, "requested_action": action}
            writer.add(pictures, row | {"capture_stamp_ns": (step + 1) * 100_000_000})
            other_arm.step(action)
        store.append(writer.close(success=True))
    return root / "data"


def test_rows_compose_to_policy_steps():
    rng = np.random.default_rng(0)
    rows = {"action": rng.uniform(-0.05, 0.05, (10, 7)), "observation.state": rng.uniform(0, 1, (10, 7))}
    recording = composed(rows, 3)
    assert recording.actions.shape == (3, 7)
    assert np.array_equal(recording.states, rows["observation.state"][[0, 3, 6, 9]].astype(np.float64))
    one = two = pose.pose([0.4, 0.1, 0.3], np.diag([1.0, -1.0, -1.0]))
    for action in rows["action"][:9]:
        one = pose.integrate(one, action)
    for action in recording.actions:
        two = pose.integrate(two, action)
    assert np.allclose(one, two, atol=1e-9)
    assert recording.actions[:, 6].tolist() == rows["action"][[2, 5, 8], 6].tolist()


def test_a_twin_with_the_recorded_dynamics_does_not_stray(other_arm, ours, data, embodiment):
    store = DatasetStore.open(data, embodiment)
    episodes = recordings(store, range(2))
    strayed = replay(other_arm, episodes[0])
    assert strayed.position_m.shape == (13,)
    assert strayed.position_m.max() < 1e-3  # the joints it starts from may differ from the recorded ones
    assert strayed.rotation_rad.max() < 5e-3
    assert np.abs(strayed.opening_m).max() < 1e-3
    assert error_m(ours, episodes) > 5 * error_m(other_arm, episodes)


def test_fit_finds_an_arm_that_strays_little_on_episodes_it_has_not_seen(ours, data, embodiment):
    fit_on, held_out = ([one] for one in recordings(DatasetStore.open(data, embodiment), range(2)))
    before_m = error_m(ours, held_out)
    assert error_m(ours, held_out) == before_m  # replays leave nothing behind
    found = fit(ours, fit_on)
    assert error_m(ours, held_out) == before_m  # nor does the fit
    ours.env.set_arm_dynamics(**found.values)
    after_m = error_m(ours, held_out)
    ours.env.set_arm_dynamics(**{name: getattr(DRIVES, name) for name in TRUE})
    assert after_m < 0.3 * before_m
    stiffness, damping, latency_s = (found.values[name] for name in TRUE)
    lag_s = damping / stiffness + latency_s  # what a drive trails an even motion by
    assert lag_s == pytest.approx(TRUE["arm_damping"] / TRUE["arm_stiffness"] + TRUE["latency_s"], abs=0.02)


def test_fit_finds_the_acceleration_of_an_arm_that_plans(embodiment):
    """What is recorded: an arm at half of the acceleration that answers 30 ms late."""
    config = TwinConfig(home_noise_rad=0.0)
    slow = Twin(dataclasses.replace(config, arm_acceleration_rad_s2=4.0, latency_s=0.03), embodiment, render=False)
    slow.env.bare = True
    slow.reset(0)
    states, actions = [slow.state], []
    for step in range(12):
        actions.append(np.array([*(0.03 * np.sin(0.6 * step + np.arange(3))), 0, 0, 0, 1.0]))
        slow.step(actions[-1])
        states.append(slow.state)
    recording = Recording(np.array(actions), np.array(states, dtype=np.float64))
    found = fit(Twin(config, embodiment, render=False), [recording])
    assert found.values["latency_s"] == pytest.approx(0.03)
    assert found.values["arm_acceleration_rad_s2"] == pytest.approx(4.0, rel=0.1)
    assert found.error_m < 5e-4


def test_command_writes_what_it_found(data, tmp_path, capsys):
    config = load("twin", TwinCommandConfig, [f"root={data}", f"runs_dir={tmp_path}", "episodes=2", "held_out=1"])
    with pytest.raises(ValueError, match="has 2 episodes"):
        fit_dynamics(config)
    assert main([]) == 1
    assert "selfcheck|replay|fit-dynamics|capture" in capsys.readouterr().err
    assert main(["replay", f"root={tmp_path}"]) == 1
    assert "is no data set" in capsys.readouterr().err
    assert main(["replay", f"root={data}", "episodes=1", f"runs_dir={tmp_path}", "pictures_every=0"]) == 0
    table, _, figures = capsys.readouterr().out.partition("{")
    assert len(table.splitlines()) == 2
    figures = json.loads("{" + figures)
    assert figures["episodes"] == 1
    assert figures["steps"] == 13
    stage = json.loads((tmp_path / "demo/stages/twin_replay.json").read_text())
    assert stage["figures"] == figures
    assert (tmp_path / "demo" / stage["files"]["replay_error"]).stat().st_size > 1000


@pytest.mark.slow
def test_fit_dynamics_command(data, tmp_path):
    assert main(["fit-dynamics", f"root={data}", f"runs_dir={tmp_path}", "episodes=1", "held_out=1"]) == 0
    found = yaml.safe_load((tmp_path / "demo/twin_fit/dynamics.yaml").read_text())
    assert set(found) == {"arm_acceleration_rad_s2", "latency_s"}
    dataclasses.replace(TwinConfig(), **found)
