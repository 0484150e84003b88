"""Session logs read back by the MCAP library itself."""

import time

import pytest
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState

from robot.session_log import SessionLog, SessionLogConfig, definition
from tests.robot.session_file import read_session


def joints(n: int) -> bytes:
    message = JointState(name=["a", "b"], position=[float(n), -0.5])
    message.header.stamp.sec = n
    return serialize_message(message)


def test_a_finished_log_has_an_index_and_says_what_was_written(tmp_path):
    log = SessionLog(tmp_path / "new" / "s.mcap")
    states, status = log.channel("/joint_states", "sensor_msgs/msg/JointState"), "diagnostic_msgs/msg/DiagnosticStatus"
    safety = log.channel("/safety_state", status)
    for n in range(1000):
        log.add(states, joints(n))
    pairs = [KeyValue(key="state", value="FAULT")]
    log.add(safety, serialize_message(DiagnosticStatus(level=b"\2", name="arm", values=pairs)))
    log.close()
    with (tmp_path / "new" / "s.mcap").open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        summary = reader.get_summary()
        assert summary.statistics.message_count == 1001
        assert len(summary.chunk_indexes) > 1
        assert {c.topic for c in summary.channels.values()} == {"/joint_states", "/safety_state"}
        rows = [m.position[0] for _, _, _, m in reader.iter_decoded_messages(topics=["/joint_states"])]
        assert rows == list(range(1000))
        ((_, _, record, message),) = reader.iter_decoded_messages(topics=["/safety_state"])
        assert (message.level, message.values[0].value) == (2, "FAULT")
    assert abs(record.log_time - time.time_ns()) < 60e9


def test_a_log_cut_anywhere_keeps_its_whole_chunks(tmp_path):
    path = tmp_path / "s.mcap"
    log = SessionLog(path)
    channel = log.channel("/joint_states", "sensor_msgs/msg/JointState")
    for n in range(1500):
        log.add(channel, joints(n))
    log.flush()
    content = path.read_bytes()  # as a killed writer leaves it
    log.close()
    whole = len(read_session(path))
    assert whole == 1500
    kept = []
    for share in (0.3, 0.7, 1.0):
        cut = tmp_path / "cut.mcap"
        cut.write_bytes(content[: int(share * len(content))])
        numbers = [m.content().position[0] for m in read_session(cut)]
        assert numbers == list(range(len(numbers)))
        kept.append(len(numbers))
    assert 0 < kept[0] < kept[1] < kept[2] < whole
    assert whole - kept[2] < 400  # one chunk


def test_nothing_is_written_over(tmp_path):
    SessionLog(tmp_path / "s.mcap").close()
    with pytest.raises(FileExistsError):
        SessionLog(tmp_path / "s.mcap")


def test_definitions_hold_all_messages_within():
    text = definition("geometry_msgs/msg/PoseStamped")
    assert text.count("=" * 80) == 5
    for inner in ("std_msgs/Header", "builtin_interfaces/Time", "geometry_msgs/Pose", "geometry_msgs/Quaternion"):
        assert f"\nMSG: {inner}\n" in text
    fields = PoseStamped.get_fields_and_field_types()
    assert list(fields) == ["header", "pose"]
    with pytest.raises(ValueError, match="tf2_msgs/TFMessage is not installed"):
        definition("tf2_msgs/msg/TFMessage")


def test_unknown_picture_codings_are_named():
    with pytest.raises(ValueError, match="allowed are"):
        SessionLogConfig(pictures="gif")
