import numpy as np
import pytest

from bridge import pose
from bridge.dataset import DatasetStore, decode_frames, read_episode
from robot.recorder import Aligner, EpisodeRecorder, RecorderConfig, RecordingBroken
from robot.track import Track, hold, linear
from tests.bridge.small_episodes import FPS, HEIGHT, WIDTH, small_embodiment

PERIOD_NS = 33_333_333
START_NS = 10_000_000_000
SPEED_M_S, TURN_RAD_S, LEAD_S = 0.12, 0.3, 0.05


def pose_at(t_ns: int) -> np.ndarray:
    """Where the tool is: straight along x, turning about its own z."""
    t = (t_ns - START_NS) / 1e9
    R = pose.matrix_from_rpy(np.array([np.pi, 0.0, 0.0])) @ pose.matrix_from_rpy(np.array([0.0, 0.0, TURN_RAD_S * t]))
    return pose.pose(np.array([0.4 + SPEED_M_S * t, 0.0, 0.2]), R)


def target_at(t_ns: int) -> np.ndarray:
    return pose_at(t_ns + round(LEAD_S * 1e9))


def gripper_at(t_ns: int) -> float:
    return 1.0 if t_ns < START_NS + 200_000_000 else -1.0


def shade(value: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), value, np.uint8)


def events(num_frames=12, wrist_offset_ns=4_000_000, lost=(), lost_wrist=(), pose_delay_ns=0, until_ns=None):
    """(arrival, call) of every message, in the order of arrival: 30 Hz pictures, 60 Hz states."""
    out = []
    for k in range(num_frames):
        t = START_NS + k * PERIOD_NS
        if k not in lost:
            out.append((t, "image", ("third_person", t, shade(k))))
        if k not in lost_wrist:
            out.append((t + wrist_offset_ns, "image", ("wrist", t + wrist_offset_ns, shade(100 + k))))
    end_ns = until_ns or START_NS + (num_frames + 2) * PERIOD_NS
    for t in range(START_NS - 100_000_000, end_ns, 16_666_667):
        for name, value in (
            ("tcp_pose", pose_at(t)),
            ("target_pose", target_at(t)),
            ("requested_pose", target_at(t)),
            ("opening", 0.01 + 0.1 * (t - START_NS) / 1e9),
            ("gripper", (gripper_at(t), 0.5 * gripper_at(t))),
        ):
            out.append((t + pose_delay_ns, "sample", (name, t, value)))
    return sorted(out, key=lambda event: event[0])


def align(messages, config=None, teleop_ns=()):
    aligner = Aligner(small_embodiment(), config or RecorderConfig(fps=FPS))
    for stamp in teleop_ns:
        aligner.teleop(stamp)
    rows = []
    for _, call, arguments in messages:
        getattr(aligner, call)(*arguments)
        rows += aligner.rows()
    return rows + list(aligner.flush()), aligner.stats


def stamps(rows):
    return [row["capture_stamp_ns"] for _, row in rows]


def test_every_picture_of_the_row_camera_is_a_row():
    rows, stats = align(events(12))
    assert stamps(rows) == [START_NS + k * PERIOD_NS for k in range(12)]
    assert [int(images["third_person"][0, 0, 0]) for images, _ in rows] == list(range(12))
    assert [int(images["wrist"][0, 0, 0]) for images, _ in rows] == [100 + k for k in range(12)]
    assert not any(row["frame_repeated"] for _, row in rows)
    assert stats.max_gap_ms == pytest.approx(33.333333)
    assert stats.rows == 12


@pytest.mark.parametrize("pose_delay_ns", [0, 25_000_000, 150_000_000])
def test_states_and_actions_belong_to_the_pictures_time_however_late_they_come(pose_delay_ns):
    rows, _ = align(events(12, pose_delay_ns=pose_delay_ns))
    assert len(rows) == 12
    for k, (_, row) in enumerate(rows):
        t = START_NS + k * PERIOD_NS
        expected = pose.state_vector(pose_at(t), 0.01 + 0.1 * (t - START_NS) / 1e9)
        np.testing.assert_allclose(row["observation.state"], expected, atol=1e-5)
        moved = [SPEED_M_S * PERIOD_NS / 1e9, 0, 0, 0, 0, TURN_RAD_S * PERIOD_NS / 1e9]
        np.testing.assert_allclose(row["action"][:6], moved, atol=1e-6)
        np.testing.assert_allclose(row["requested_action"][:6], moved, atol=1e-6)


def test_actions_compose_to_the_commanded_motion():
    rows, _ = align(events(13))
    T = target_at(START_NS)
    for _, row in rows[:12]:
        T = pose.integrate(T, row["action"])
    np.testing.assert_allclose(T, target_at(START_NS + 12 * PERIOD_NS), atol=1e-6)


def test_the_gripper_command_is_the_one_in_effect_at_the_next_row():
    rows, _ = align(events(12))
    for k, (_, row) in enumerate(rows[:-1]):
        # 60 Hz samples: a command is seen up to one sample after it was sent.
        next_ns = START_NS + (k + 1) * PERIOD_NS
        if abs(next_ns - START_NS - 200_000_000) > 17_000_000:
            assert row["action"][6] == gripper_at(next_ns)
            assert row["requested_action"][6] == 0.5 * gripper_at(next_ns)


def test_a_lost_picture_is_repeated_and_rows_stay_even():
    rows, stats = align(events(12, lost=(4, 5)))
    assert [int(images["third_person"][0, 0, 0]) for images, _ in rows] == [0, 1, 2, 3, 3, 3, 6, 7, 8, 9, 10, 11]
    assert [row["frame_repeated"] for _, row in rows] == [k in (4, 5) for k in range(12)]
    np.testing.assert_allclose(np.diff(stamps(rows)), PERIOD_NS, atol=2)
    assert stats.repeated == {"third_person": 2, "wrist": 0}
    assert stats.max_gap_ms == pytest.approx(100, abs=0.1)
    assert stats.gaps_over_50ms == 1


def test_a_lost_picture_of_another_camera_is_repeated():
    rows, stats = align(events(12, lost_wrist=(5,)))
    assert [int(images["wrist"][0, 0, 0]) for images, _ in rows][4:7] == [104, 104, 106]
    assert [row["frame_repeated"] for _, row in rows] == [k == 5 for k in range(12)]
    assert stats.repeated == {"third_person": 0, "wrist": 1}


def test_rows_do_not_wait_forever_for_another_camera():
    rows, stats = align(events(12, lost_wrist=range(6, 12)), RecorderConfig(fps=FPS, max_wait_s=0.1))
    assert len(rows) == 12
    assert [int(images["wrist"][0, 0, 0]) for images, _ in rows][5:] == [105] * 7
    assert stats.repeated["wrist"] == 6


def test_pictures_before_the_first_state_are_no_rows():
    late = [e for e in events(12) if e[1] == "image" or e[2][1] >= START_NS + 3 * PERIOD_NS - 1_000_000]
    rows, stats = align(late)
    assert stamps(rows)[0] >= START_NS + 3 * PERIOD_NS
    assert stats.skipped_at_start == 12 - len(rows)
    assert len(rows) >= 8


def test_stamps_always_grow():
    messages = events(12)
    images = [e for e in messages if e[2][0] == "third_person"]
    doubled = sorted([*messages, *images[3:6]], key=lambda e: e[0])
    rows, stats = align([*doubled, images[2]])
    assert (np.diff(stamps(rows)) > 0).all()
    assert stats.late_ignored == 4


@pytest.mark.parametrize("silent", ["tcp_pose", "target_pose", "gripper"])
def test_a_silent_stream_is_named(silent):
    kept = [e for e in events(80) if e[2][0] != silent or e[2][1] < START_NS + 5 * PERIOD_NS]
    with pytest.raises(RecordingBroken, match=silent):
        align(kept)


def test_a_camera_that_stops_is_named():
    with pytest.raises(RecordingBroken, match="third_person for the last"):
        align(events(5, until_ns=START_NS + 2_000_000_000))
    with pytest.raises(RecordingBroken, match="no picture of wrist"):
        align(events(90, lost_wrist=range(5, 90)))
    with pytest.raises(RecordingBroken, match="no picture of third_person for"):
        align(events(40, lost=range(5, 30)))


def test_teleoperated_rows_are_marked():
    """One action at row 4, in effect for one and a half policy periods (150 ms, 4.5 rows)."""
    rows, _ = align(events(12), teleop_ns=[START_NS + 4 * PERIOD_NS])
    assert [row["intervention"] for _, row in rows] == [3 <= k <= 8 for k in range(12)]


def test_track_interpolates_and_holds():
    track = Track(linear)
    for stamp, value in [(0, 0.0), (10, 1.0), (10, 9.0), (5, 9.0), (20, 3.0)]:
        track.add(stamp, value)
    assert [track.at(t) for t in (-5, 0, 5, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 2, 3, 3]
    held = Track(hold)
    for stamp, value in [(0, "a"), (10, "b")]:
        held.add(stamp, value)
    assert [held.at(t) for t in (0, 9, 10, 11)] == ["a", "a", "b", "b"]


def test_track_forgets_what_is_old():
    track = Track(linear, keep=10)
    for t in range(100):
        track.add(t, float(t))
    assert len(track.stamps_ns) <= 21
    assert track.at(95) == 95


# --- whole episodes -----------------------------------------------------------------------------------------------


def feed(recorder, messages):
    for _, call, arguments in messages:
        recorder.image(*arguments) if call == "image" else recorder.aligner.sample(*arguments)


@pytest.fixture
def recorder(tmp_path):
    return EpisodeRecorder(small_embodiment(), RecorderConfig(fps=FPS), tmp_path / "spool", "stand_in")


def test_an_episode_reaches_the_data_set(tmp_path, recorder):
    store = DatasetStore.create(tmp_path / "data", "lab/cube", small_embodiment(), FPS)
    feed(recorder, events(3))  # between episodes pictures are ignored and states remembered
    recorder.start("pick up the cube")
    feed(recorder, [e for e in events(20) if e[0] >= START_NS + 5 * PERIOD_NS])
    folder, stats = recorder.save(success=True)
    rows = read_episode(store.root, store.append(folder))
    assert len(rows["action"]) == stats.rows == 15
    assert rows["next.success"].tolist() == [False] * 14 + [True]
    frames = list(decode_frames(folder / "wrist.mp4"))
    assert [round(frame.mean()) for frame in frames] == pytest.approx([105 + k for k in range(15)], abs=2)
    assert not recorder.recording


def test_a_broken_episode_is_not_saved(recorder):
    recorder.start("pick up the cube")
    feed(recorder, events(40, lost=range(5, 30)))
    assert "third_person" in recorder.broken
    with pytest.raises(RecordingBroken, match="third_person"):
        recorder.save(True)
    assert not list(recorder.spool.iterdir())
    recorder.start("pick up the cube")
    feed(recorder, [e for e in events(58) if e[0] >= START_NS + 50 * PERIOD_NS])
    assert recorder.save(True)[1].rows == 8


def test_the_end_waits_for_pictures_under_way(recorder):
    """Poses are there up to row 19, pictures of the last ten come afterwards; what was after the end does not count."""
    recorder.start("pick up the cube")
    messages = events(30, until_ns=START_NS + 19 * PERIOD_NS + 10_000_000)
    is_late = [e[1] == "image" and e[0] >= START_NS + 10 * PERIOD_NS for e in messages]
    late = [e for e, behind in zip(messages, is_late, strict=True) if behind]
    feed(recorder, [e for e, behind in zip(messages, is_late, strict=True) if not behind])
    recorder.end()
    assert not recorder.caught_up
    feed(recorder, late)
    assert recorder.caught_up
    assert recorder.save(True)[1].rows == 20


def test_what_comes_after_the_end_changes_nothing(tmp_path, recorder):
    """A person may take a minute to say how it went: more samples than a track keeps, and pictures."""
    recorder.start("pick up the cube")
    end_ns = START_NS + 10 * PERIOD_NS
    feed(recorder, [e for e in events(10) if e[0] < end_ns])
    recorder.end()
    recorder.finish()
    feed(recorder, [e for e in events(20) if e[0] >= end_ns])
    feed(recorder, events(0, until_ns=START_NS + 75_000_000_000))
    recorder.end()
    folder, stats = recorder.save(True)
    assert stats.rows == 10
    store = DatasetStore.create(tmp_path / "data", "lab/cube", small_embodiment(), FPS)
    store.append(folder)
    x_m = read_episode(tmp_path / "data", 0)["observation.state"][:, 0]
    np.testing.assert_allclose(np.diff(x_m), SPEED_M_S * PERIOD_NS * 1e-9, atol=1e-3)


def test_the_last_row_waits_for_the_other_cameras_picture(recorder):
    """It is taken 4 ms after the row's own, and after the last sample of the arm."""
    recorder.start("pick up the cube")
    messages = events(10, until_ns=START_NS + 9 * PERIOD_NS + 2_000_000)
    last = max((e for e in messages if e[2][0] == "wrist"), key=lambda e: e[0])
    feed(recorder, [e for e in messages if e is not last])
    recorder.end()
    assert not recorder.caught_up
    feed(recorder, [last])
    assert recorder.caught_up
    folder, stats = recorder.save(True)
    assert (stats.rows, sum(stats.repeated.values())) == (10, 0)
    assert round(list(decode_frames(folder / "wrist.mp4"))[-1].mean()) == pytest.approx(109, abs=2)


def test_no_rows_is_no_episode(recorder):
    recorder.start("pick up the cube")
    with pytest.raises(RecordingBroken, match="no row"):
        recorder.save(True)


def test_calls_in_the_wrong_order_say_so(recorder):
    for call in (lambda: recorder.save(True), recorder.discard):
        with pytest.raises(ValueError, match="start one first"):
            call()
    recorder.start("x")
    with pytest.raises(ValueError, match="save or discard"):
        recorder.start("x")
    recorder.discard()
    assert not list(recorder.spool.iterdir())
