"""Pictures of the cell through the real RealSense SDK: `rs.pipeline` on the software devices."""

import time
from copy import deepcopy

import numpy as np
import pyrealsense2 as rs
import pytest
import zmq

from bridge.embodiment import Embodiment
from sim.stand_in.camera_device import StandInCameras
from sim.stand_in.errors import CellGone
from sim.stand_in.frames import FrameFeed


def open_pipeline(cameras: StandInCameras, name: str) -> rs.pipeline:
    pipeline, request = rs.pipeline(cameras.context), rs.config()
    request.enable_device(cameras.serials[name])
    request.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
    pipeline.start(request)
    return pipeline


def test_frames_come_on_the_grid_of_simulated_time(timed_cell, config):
    cameras = StandInCameras(timed_cell.frames_endpoint, config.embodiment, config.cell)
    pipelines = {name: open_pipeline(cameras, name) for name in config.embodiment.cameras}
    with cameras:
        stamps_ms, numbers, pictures = {name: [] for name in pipelines}, {name: [] for name in pipelines}, {}
        for _ in range(10):
            for name, pipeline in pipelines.items():
                frame = pipeline.wait_for_frames(3000).get_color_frame()
                stamps_ms[name].append(frame.get_timestamp())
                numbers[name].append(frame.get_frame_number())
                pictures[name] = np.asanyarray(frame.get_data()).copy()
                assert frame.get_frame_metadata(rs.frame_metadata_value.sensor_timestamp) == stamps_ms[name][-1] * 1000
        now_s = timed_cell.client.stats()["time_s"]
    for name in pipelines:
        np.testing.assert_allclose(np.diff(stamps_ms[name]) / np.diff(numbers[name]), 1000 / 30, atol=1.01)
        np.testing.assert_allclose(stamps_ms[name], np.array(numbers[name]) * 1000 / 30, atol=0.51)
        assert abs(now_s - stamps_ms[name][-1] / 1000) < 0.5, "the stamp is the cell's clock"
        assert pictures[name].shape == (480, 640, 3)
        assert pictures[name].std() > 10
    profile = pipelines["wrist"].get_active_profile().get_stream(rs.stream.color).as_video_stream_profile()
    camera = config.embodiment.cameras["wrist"]
    assert (profile.intrinsics.fx, profile.intrinsics.ppy) == (camera.fx, camera.cy)
    for pipeline in pipelines.values():
        pipeline.stop()
    assert timed_cell.client.stats()["cameras_dropped"] == 0


def test_another_scene_is_refused(timed_cell, config):
    other = deepcopy(config.cell)
    other.looks.ambient += 0.1
    cameras = StandInCameras(timed_cell.frames_endpoint, config.embodiment, other)
    with pytest.raises(ValueError, match="another scene"):
        cameras.start()


def test_without_a_cell(config):
    cameras = StandInCameras("tcp://127.0.0.1:1", config.embodiment, config.cell)
    with pytest.raises(CellGone, match="cotwin cell"):
        cameras.start(timeout_s=0.5)
    with pytest.raises(ValueError, match="serial"):
        StandInCameras("tcp://127.0.0.1:1", config.embodiment, type(config.cell)())


class TestFrameFeed:
    """The cell's side against a bare socket: who waits for whom, and for how long."""

    @pytest.fixture
    def feed(self, world, monkeypatch):
        monkeypatch.setattr("sim.stand_in.frames.CLIENT_PATIENCE_S", 0.2)
        context = zmq.Context()
        feed = FrameFeed(context, "tcp://127.0.0.1:*", world, "hash", 30.0)
        yield feed
        feed.close()
        context.destroy(linger=0)

    @pytest.fixture
    def talk(self, feed):
        import msgpack

        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(feed.endpoint)

        def talk(message=None):
            """Send, let the feed serve, and return all it has said."""
            if message is not None:
                socket.send(msgpack.packb(message))
                feed.wait(1.0)
            feed.serve()
            said = []
            while socket.poll(50):
                said.append(msgpack.unpackb(socket.recv()))
            return said

        yield talk
        context.destroy(linger=0)

    def test_grid(self, feed):
        due_ms = []
        for _ in range(6):
            due_ms.append(feed.due_ms)
            assert feed.emit(feed.due_ms), "without a client nothing waits"
        assert due_ms == [33, 67, 100, 133, 167, 200]

    def test_the_clock_waits_for_credit(self, feed, talk, world):
        assert talk({"hello": "hash", "window": 2}) == [{"welcome": 30.0}]
        assert feed.emit(33)
        assert feed.emit(67)
        assert not feed.emit(100)
        frames = talk()
        assert [f["time_ms"] for f in frames] == [33, 67]
        np.testing.assert_array_equal(np.frombuffer(frames[0]["qpos"]), world.data.qpos)
        talk({"credit": 1})
        assert feed.emit(100)
        assert [f["frame"] for f in talk()] == [3]

    def test_a_dead_client_is_given_up_and_may_come_back(self, feed, talk):
        talk({"hello": "hash", "window": 1})
        assert feed.emit(33)
        assert not feed.emit(67)
        time.sleep(0.25)
        assert feed.emit(67)
        assert feed.clients_dropped == 1
        assert {"unknown": True} in talk({"credit": 1})
        assert talk({"hello": "hash", "window": 1}) == [{"welcome": 30.0}]
        assert feed.emit(100)
        assert [f["time_ms"] for f in talk()] == [100]

    def test_a_wrong_scene(self, feed, talk):
        (answer,) = talk({"hello": "other"})
        assert "another scene" in answer["refused"]
        assert feed.emit(33), "a refused client holds nothing up"


def test_embodiments_without_cameras_build_too(config):
    from sim.stand_in.scene import build_model

    assert build_model(config.cell, Embodiment()).ncam == 0
