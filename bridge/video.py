"""One H.264 file, one frame for each picture given, encoded in a thread of its own."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# ultrafast with a key frame every 15 costs least on every count but size (measured: CPU, lateness, random reads).
CODEC = "libx264"
OPTIONS = {"preset": "ultrafast", "crf": "23", "g": "15", "threads": "1"}
PIXEL_FORMAT = "yuv420p"
# Every group of pictures is on the disk by itself until the file is finished and becomes an ordinary MP4: what a kill
# leaves can be read up to the last group.
CONTAINER_OPTIONS = {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"}


class VideoWriter:
    """Encodes while more pictures come in. `add` waits when the queue is full: a picture is never dropped.

    `size` is (height, width), both even (4:2:0 colour). A failure of the encoder is raised by the next call.
    """

    def __init__(self, path: Path, fps: int, size: tuple[int, int], queue_frames: int = 30):
        if size[0] % 2 or size[1] % 2:
            raise ValueError(f"video size {size[1]}x{size[0]}: H.264 needs an even width and height")
        self.path, self.fps, self.size = path, fps, size
        self.num_frames = 0
        self.histogram = np.zeros((3, 256), np.int64)  # of every stride-th pixel
        self._stride = max(1, max(size) // 80)
        self._frames: queue.Queue[np.ndarray | None] = queue.Queue(queue_frames)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"encode {path.name}", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        """Pictures that wait to be encoded."""
        return self._frames.qsize()

    def add(self, frame: np.ndarray) -> None:
        """`frame` uint8 [H, W, 3] RGB; it is read later, so its owner must not write into it again."""
        if frame.dtype != np.uint8 or frame.shape != (*self.size, 3):
            raise ValueError(f"{self.path.name}: frame {frame.dtype} {frame.shape}, expected uint8 {(*self.size, 3)}")
        self._put(frame)
        self.num_frames += 1

    def close(self) -> None:
        """Finish the file and decode it again: raises RuntimeError when it does not hold one frame for each `add`."""
        if self._thread.is_alive():
            self._put(None)
            self._thread.join()
        self._raise_failure()
        if (decoded := count_frames(self.path)) != self.num_frames:
            raise RuntimeError(f"{self.path} holds {decoded} frames for {self.num_frames} pictures")

    def abort(self) -> None:
        """Stop and leave whatever is in the file."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._frames.get_nowait()
        self._frames.put(None)
        self._thread.join()

    def _put(self, frame: np.ndarray | None) -> None:
        while True:
            self._raise_failure()
            assert self._thread.is_alive(), f"{self.path} is closed"
            try:
                return self._frames.put(frame, timeout=0.2)
            except queue.Full:
                continue

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"encoding {self.path} failed: {self._error}") from self._error

    def _run(self) -> None:
        try:
            with av.open(str(self.path), "w", options=CONTAINER_OPTIONS) as container:
                stream = container.add_stream(CODEC, self.fps, options=OPTIONS)
                stream.height, stream.width, stream.pix_fmt = *self.size, PIXEL_FORMAT
                stream.codec_context.time_base = Fraction(1, self.fps)
                index = 0
                while (picture := self._frames.get()) is not None:
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts, frame.time_base = index, Fraction(1, self.fps)
                    container.mux(stream.encode(frame))
                    self._count_pixels(picture)
                    index += 1
                container.mux(stream.encode())
        except (av.FFmpegError, OSError, ValueError) as error:
            self._error = error

    def _count_pixels(self, picture: np.ndarray) -> None:
        sample = picture[:: self._stride, :: self._stride]
        for channel in range(3):
            self.histogram[channel] += np.bincount(sample[..., channel].ravel(), minlength=256)


def decode_frames(path: Path) -> Iterator[np.ndarray]:
    """Every frame in order, uint8 [H, W, 3] RGB."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def readable_frames(path: Path) -> int:
    """How many frames come before the first damage; 0 for what is no video."""
    frames = 0
    with (
        contextlib.suppress(av.FFmpegError, OSError),
        av.open(str(path), options={"err_detect": "explode"}) as container,
    ):
        for stream in container.streams.video:
            stream.codec_context.options = {"err_detect": "explode"}
        for _ in container.decode(video=0):
            frames += 1
    return frames


def count_frames(path: Path) -> int:
    """By decoding, not by what the header says."""
    frames = 0
    with av.open(str(path)) as container:
        for _ in container.decode(video=0):
            frames += 1
    return frames


def write_video(path: Path, frames: Iterator[np.ndarray], fps: int) -> int:
    """Encode frames (uint8 [H, W, 3]) to `path`; returns how many. ValueError when there is none."""
    writer = None
    for frame in frames:
        writer = writer or VideoWriter(path, fps, (frame.shape[0], frame.shape[1]))
        writer.add(np.ascontiguousarray(frame))
    if writer is None:
        raise ValueError(f"no frames for {path}")
    writer.close()
    return writer.num_frames
