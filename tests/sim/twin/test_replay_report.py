"""Pictures and success of recordings beside the twin's: the recording is the twin's own, so both must agree."""

import numpy as np
import pytest

from bridge.dataset import DatasetStore, EpisodeWriter
from bridge.video import count_frames
from sim.expert import PickPlaceExpert
from sim.twin.replay import Recording, recordings
from sim.twin.replay_report import means, pictures, places, put, recorded_frames

SIZE = (96, 128)  # height, width


@pytest.fixture(scope="module")
def recorded(twin, embodiment, tmp_path_factory) -> tuple[DatasetStore, np.ndarray, np.ndarray]:
    """One episode of the scripted expert in the twin itself, and where cube and plate were."""
    root = tmp_path_factory.mktemp("recorded")
    store = DatasetStore.create(root / "data", "test/recorded", embodiment, 10, SIZE)
    writer = EpisodeWriter(root / "0", embodiment, 10, embodiment.instructions[0], "twin", SIZE)
    twin.reset(3)
    cube_m, plate_m = twin.facts.object_pos_m.copy(), twin.facts.goal_pos_m.copy()
    expert, step = PickPlaceExpert(embodiment, 3), 0
    while not twin.ended:
        facts = twin.facts
        action = expert.act(facts.T_base_target, facts.gripper_opening_m, facts.object_pos_m, facts.goal_pos_m)
        row = {"observation.state": twin.state, "action": action, "requested_action": action}
        step += 1
        writer.add(twin.pictures(), row | {"capture_stamp_ns": step * 100_000_000})
        twin.step(action)
    assert twin.facts.success
    store.append(writer.close(success=True))
    return store, cube_m, plate_m


def test_places_are_where_the_arm_took_and_gave(recorded):
    store, cube_m, plate_m = recorded
    found = places(recordings(store, [0])[0])
    assert found is not None
    np.testing.assert_allclose(found[0], cube_m[:2], atol=0.008)
    np.testing.assert_allclose(found[1], plate_m[:2], atol=0.02)  # where the cube was let go, not the plate's centre


def test_no_place_where_nothing_was_held():
    actions, states = np.zeros((6, 7)), np.zeros((7, 7))
    actions[:, 6], states[:, 6] = -1.0, [0.08, 0.06, 0.03, 0.0, 0.0, 0.0, 0.0]
    assert places(Recording(actions, states)) is None


def test_the_twin_agrees_with_its_own_recording(recorded, twin, tmp_path):
    store = recorded[0]
    recording = recordings(store, [0])[0]
    found = pictures({"sapien": twin}, store, 0, recording, 8, tmp_path / "film.mp4")
    assert found["success_agrees"] is True
    for camera in ("third_person", "wrist"):
        assert found[f"sapien_{camera}_psnr_db"] > 25  # H.264, and a cube some millimetres elsewhere
        assert found[f"sapien_{camera}_ssim"] > 0.85
    assert count_frames(tmp_path / "film.mp4") == -(-len(recording.actions) // 8)
    other = recorded_frames(store, 0, SIZE)
    assert len(other) >= len(recording.actions)
    assert other[0]["wrist"].shape == (*SIZE, 3)


def test_things_are_put_where_they_are_asked(twin, embodiment):
    twin.reset(1)
    T = twin.facts.T_base_tcp.copy()
    T[:3, 3] += [0.02, -0.03, 0.01]
    put(twin, T, 0.05, (np.array([0.36, 0.17]), np.array([0.47, -0.02])))
    np.testing.assert_allclose(twin.facts.object_pos_m[:2], [0.36, 0.17], atol=1e-6)
    np.testing.assert_allclose(twin.facts.goal_pos_m[:2], [0.47, -0.02], atol=1e-6)
    np.testing.assert_allclose(twin.facts.T_base_tcp, T, atol=1e-4)
    assert twin.facts.gripper_opening_m == pytest.approx(0.05, abs=1e-6)
    with_things = twin.pictures()["third_person"].astype(int)
    put(twin, T, 0.05, None)
    alone = twin.pictures()["third_person"].astype(int)
    twin.env.bare = False  # the next test's episodes have things again
    assert (np.abs(with_things - alone).max(axis=-1) > 30).sum() > 20  # the cube and the plate are gone


def test_means_leave_out_what_an_episode_lacks():
    found = [{"episode": 0, "mm": 1.0, "success_agrees": True}, {"episode": 1, "mm": 2.0, "success_agrees": None}]
    assert means(found) == {"episodes": 2, "mm": 1.5, "success_agrees": 1.0}
