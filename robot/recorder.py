"""Streams with their own clocks become rows: one for each picture of the row camera.

consumes   pictures of all cameras, measured and commanded poses, gripper, teleoperation: any order between streams
produces   `(images, row)` for `bridge.episode.EpisodeWriter`, evenly spaced in time, none lost
waits for  the next picture of the row camera, and samples of every stream at that time: about two frame periods

Row k at the time t_k of its picture: `state` is the measured TCP pose and finger opening interpolated to t_k; `action`
is the motion of the commanded target from t_k to t_k+1 and the gripper command in effect at t_k+1, so rows compose.
A picture that a camera lost is repeated and the row says so: rows and pictures never shift.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge import pose
from bridge.embodiment import Embodiment
from bridge.episode import EpisodeWriter
from robot.config import setting
from robot.track import Track, hold, linear

TRACKS = ("tcp_pose", "target_pose", "requested_pose", "opening", "gripper")
Row = tuple[dict[str, np.ndarray], dict[str, Any]]


class RecordingBroken(RuntimeError):
    """The episode cannot be saved as recorded: a stream went silent or the encoders fell behind. Names which."""


@dataclass
class RecorderConfig:
    """How pictures and samples are matched."""

    fps: int = setting(30, "rate of the row camera (Hz)", (1, 120))
    row_camera: str = setting("third_person", "camera whose every picture is a row")
    nearest_share: float = setting(
        0.75, "other cameras: largest distance of a matching picture, in frame periods", (0.1, 2.0)
    )
    max_wait_s: float = setting(1.5, "how long a row waits for another camera's picture (s)", (0.01, 30.0))
    max_gap_s: float = setting(0.5, "longer without a picture breaks the episode (s)", (0.01, 30.0))
    max_lag_s: float = setting(2.0, "a pose stream later than this breaks the episode (s)", (0.02, 60.0))
    max_backlog_frames: int = setting(150, "pictures the encoders may be behind", (1, 10_000))

    def __post_init__(self):
        if not 0 < self.max_wait_s < self.max_lag_s:
            raise ValueError(f"max_wait_s {self.max_wait_s} must lie between 0 and max_lag_s {self.max_lag_s}")

    @property
    def period_ns(self) -> int:
        return round(1e9 / self.fps)


@dataclass
class RecordingStats:
    """Of one episode. `repeated` counts rows that show an older picture, for each camera."""

    rows: int = 0
    skipped_at_start: int = 0
    late_ignored: int = 0
    max_gap_ms: float = 0.0  # between consecutive pictures of the row camera
    gaps_over_50ms: int = 0
    repeated: dict[str, int] = field(default_factory=dict)
    max_backlog: int = 0


@dataclass
class _Slot:
    """One row to be: the time of a picture of the row camera, or of one that it lost."""

    stamp_ns: int
    picture: np.ndarray
    repeated: bool


class Aligner:
    """Feed it with `image` and `sample`, then take what `rows()` has ready. Poses are kept between episodes."""

    def __init__(self, embodiment: Embodiment, config: RecorderConfig):
        if config.row_camera not in embodiment.cameras:
            raise ValueError(f"row_camera {config.row_camera!r}: the contract has {sorted(embodiment.cameras)}")
        self.config = config
        self._others = [name for name in embodiment.cameras if name != config.row_camera]
        self._teleop_hold_ns = round(1.5e9 * embodiment.period_s)
        self._teleop_ns = deque[int](maxlen=256)
        blends = {"opening": linear, "gripper": hold}
        self._tracks = {name: Track(blends.get(name, pose.interpolate)) for name in TRACKS}
        self.begin()

    def begin(self) -> None:
        """A new episode: forget pictures and counts."""
        self.stats = RecordingStats(repeated=dict.fromkeys([self.config.row_camera, *self._others], 0))
        self._slots: deque[_Slot] = deque()
        self._newest_ns = -1  # stamp of the row camera's last picture
        self._end_ns = 2**63
        self._frames: dict[str, deque[tuple[int, np.ndarray]]] = {name: deque(maxlen=64) for name in self._others}
        self._shown: dict[str, tuple[int, np.ndarray]] = {}  # what the last row showed of each other camera

    def sample(self, track: str, stamp_ns: int, value: Any) -> None:
        """`tcp_pose`, `target_pose`, `requested_pose`: T_base_tcp [4, 4]; `opening`: m; `gripper`: (sent, asked)."""
        self._tracks[track].add(stamp_ns, value)

    def teleop(self, stamp_ns: int) -> None:
        """A teleoperation action came in: the motion that follows is a person's (or the expert's), not a policy's."""
        self._teleop_ns.append(stamp_ns)

    def image(self, camera: str, stamp_ns: int, picture: np.ndarray) -> None:
        """uint8 [H, W, 3], not written to afterwards."""
        if stamp_ns > self._end_ns + (camera != self.config.row_camera) * self.config.period_ns // 2:
            return  # another camera's picture may belong to the last row and be a little younger
        if camera != self.config.row_camera:
            frames = self._frames[camera]
            if frames and stamp_ns <= frames[-1][0]:
                self.stats.late_ignored += 1
            else:
                frames.append((stamp_ns, picture))
            return
        if stamp_ns <= self._newest_ns:
            self.stats.late_ignored += 1
            return
        if self._newest_ns >= 0:
            self._fill_gap(stamp_ns)
        self._slots.append(_Slot(stamp_ns, picture, repeated=False))
        self._last_picture, self._newest_ns = picture, stamp_ns

    def end(self) -> None:
        """The episode ends at the newest sample; pictures up to then may still come. The first end counts."""
        self._end_ns = min(self._end_ns, max(track.newest_ns for track in self._tracks.values()))

    @property
    def unheard(self) -> list[str]:
        """Streams of which no sample has ever come."""
        return [name for name, track in self._tracks.items() if not track.stamps_ns]

    @property
    def lag_ns(self) -> int:
        """How far pictures are behind the episode's end, or behind the newest sample while it goes on."""
        if self._newest_ns < 0:
            return 0
        return min(self._end_ns, max(track.newest_ns for track in self._tracks.values())) - self._newest_ns

    @property
    def caught_up(self) -> bool:
        """Whether every camera's pictures have come up to the end."""
        if self.lag_ns > 1.5 * self.config.period_ns:
            return False
        last_ns = self._newest_ns - self.config.period_ns // 2
        return all(frames and frames[-1][0] >= last_ns for frames in self._frames.values())

    def rows(self) -> Iterator[Row]:
        """All rows that are complete. Raises RecordingBroken when the oldest has waited for too long."""
        while len(self._slots) >= 2:
            slot, next_ns = self._slots[0], self._slots[1].stamp_ns
            if missing := self._missing(slot.stamp_ns, next_ns):
                if self._newest_ns - slot.stamp_ns > self.config.max_lag_s * 1e9:
                    raise RecordingBroken(f"no {missing} for more than {self.config.max_lag_s} s ({self._ages()})")
                return
            yield from self._emit(next_ns)

    def flush(self) -> Iterator[Row]:
        """The rows left at the end, with what is known: after the last sample the target stands still.
        Raises RecordingBroken when pictures had stopped long before."""
        if self.lag_ns > self.config.max_gap_s * 1e9:
            raise RecordingBroken(f"no picture of {self.config.row_camera} for the last {self.lag_ns / 1e9:.2f} s")
        while self._slots:
            following = self._slots[1].stamp_ns if len(self._slots) > 1 else None
            yield from self._emit(following or self._slots[0].stamp_ns + self.config.period_ns)

    def _fill_gap(self, stamp_ns: int) -> None:
        gap_ns = stamp_ns - self._newest_ns
        self.stats.max_gap_ms = max(self.stats.max_gap_ms, gap_ns / 1e6)
        self.stats.gaps_over_50ms += gap_ns > 50_000_000
        if gap_ns > self.config.max_gap_s * 1e9:
            raise RecordingBroken(f"no picture of {self.config.row_camera} for {gap_ns / 1e9:.2f} s")
        steps = max(1, round(gap_ns / self.config.period_ns))
        for step in range(1, steps):
            lost_ns = self._newest_ns + gap_ns * step // steps
            self._slots.append(_Slot(lost_ns, self._last_picture, repeated=True))

    def _ages(self) -> str:
        """How far each stream is behind the newest picture."""
        newest = {name: track.newest_ns for name, track in self._tracks.items()}
        newest |= {name: frames[-1][0] for name, frames in self._frames.items() if frames}
        return ", ".join(f"{name} {(self._newest_ns - ns) * 1e-9:.2f} s behind" for name, ns in newest.items())

    def _missing(self, stamp_ns: int, next_ns: int) -> str:
        """Which stream a row still waits for; empty when it is complete."""
        for name, track in self._tracks.items():
            if not track.reaches(next_ns):
                return name
        given_up = self._newest_ns - stamp_ns > self.config.max_wait_s * 1e9
        for name, frames in self._frames.items():
            if not given_up and not (frames and frames[-1][0] >= stamp_ns):
                return f"{name} picture"
        return ""

    def _emit(self, next_ns: int) -> Iterator[Row]:
        slot = self._slots.popleft()
        now = slot.stamp_ns
        shown = {name: self._nearest(name, now) for name in self._others}
        started = self.stats.rows > 0
        if not started and not (all(track.begins_by(now) for track in self._tracks.values()) and all(shown.values())):
            self.stats.skipped_at_start += 1
            return
        images, repeated = {self.config.row_camera: slot.picture}, slot.repeated
        self.stats.repeated[self.config.row_camera] += slot.repeated
        for name, frame in shown.items():
            if frame is None or frame[0] == self._shown.get(name, (-1,))[0]:
                repeated = True
                self.stats.repeated[name] += 1
                frame = self._shown[name]
                if now - frame[0] > self.config.max_gap_s * 1e9:
                    raise RecordingBroken(f"no picture of {name} for {(now - frame[0]) / 1e9:.2f} s")
            self._shown[name] = frame
            images[name] = frame[1]
        self.stats.rows += 1
        yield images, self._row(now, next_ns) | {"frame_repeated": repeated}

    def _nearest(self, camera: str, stamp_ns: int) -> tuple[int, np.ndarray] | None:
        """The camera's picture nearest in time, not older than the one last shown; None when none is near enough."""
        frames = self._frames[camera]
        while len(frames) > 1 and abs(frames[1][0] - stamp_ns) <= abs(frames[0][0] - stamp_ns):
            frames.popleft()
        reach_ns = self.config.nearest_share * self.config.period_ns
        return frames[0] if frames and abs(frames[0][0] - stamp_ns) <= reach_ns else None

    def _row(self, now: int, next_ns: int) -> dict[str, Any]:
        at = {name: track.at for name, track in self._tracks.items()}
        sent, requested = at["gripper"](next_ns)
        action = pose.delta(at["target_pose"](now), at["target_pose"](next_ns))
        asked = pose.delta(at["requested_pose"](now), at["requested_pose"](next_ns))
        return {
            "observation.state": pose.state_vector(at["tcp_pose"](now), at["opening"](now)),
            "action": np.append(action, sent),
            "requested_action": np.append(asked, requested),
            "capture_stamp_ns": now,
            "intervention": any(t <= next_ns and t + self._teleop_hold_ns > now for t in self._teleop_ns),
        }


class EpisodeRecorder:
    """One episode at a time from an `Aligner` into an `EpisodeWriter`. Its calls never wait for an encoder."""

    def __init__(self, embodiment: Embodiment, config: RecorderConfig, spool: Path, domain: str):
        self.aligner = Aligner(embodiment, config)
        self.embodiment, self.config, self.spool, self.domain = embodiment, config, spool, domain
        self._writer: EpisodeWriter | None = None
        self._broken: str = ""

    @property
    def recording(self) -> bool:
        return self._writer is not None

    @property
    def broken(self) -> str:
        """Why the running episode cannot be saved; empty while all is well."""
        return self._broken

    def start(self, instruction: str) -> str:
        """Begin an episode and return its folder's name. ValueError while another one runs."""
        if self._writer is not None:
            raise ValueError("an episode is being recorded; save or discard it first")
        self.spool.mkdir(parents=True, exist_ok=True)
        name = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000_000:09d}"
        self._writer = EpisodeWriter(
            self.spool / name,
            self.embodiment,
            self.config.fps,
            instruction,
            self.domain,
            queue_frames=self.config.max_backlog_frames + 1,
        )
        self._broken = ""
        self.aligner.begin()
        return name

    def image(self, camera: str, stamp_ns: int, picture: np.ndarray) -> None:
        """A new picture; rows that it completes go to the encoders. Ignored between episodes."""
        if self._writer is None or self._broken:
            return
        try:
            self.aligner.image(camera, stamp_ns, picture)
            self._write(self.aligner.rows())
        except RecordingBroken as error:
            self._broken = str(error)

    def end(self) -> None:
        """The episode is over now, if it was not before. Pictures up to now may still be on their way: see `caught_up`,
        then `finish` or `save`."""
        self.aligner.end()

    @property
    def caught_up(self) -> bool:
        """Whether pictures have come up to the end; `save` before that would cut them off."""
        return bool(self._broken) or self.aligner.caught_up

    def finish(self) -> None:
        """Write the rows that are left, while the samples around them are still kept: `save` may come much later.
        ValueError when no episode runs."""
        self._running()
        try:
            if not self._broken:
                self._write(self.aligner.flush())
        except RecordingBroken as error:
            self._broken = str(error)

    def save(self, success: bool) -> tuple[Path, RecordingStats]:
        """Finish the episode. Raises RecordingBroken when it cannot be saved (it is discarded), ValueError when none
        runs."""
        writer = self._running()
        try:
            self.finish()
            if self._broken:
                raise RecordingBroken(self._broken)
            if writer.num_rows == 0:
                raise RecordingBroken("no row was recorded: pictures or poses did not arrive")
        except RecordingBroken:
            self.discard()
            raise
        self._writer = None
        stats = self.aligner.stats
        return writer.close(success, extra={"recording": vars(stats)}), stats

    def discard(self) -> None:
        """Throw the running episode away. ValueError when none runs."""
        writer, self._writer = self._running(), None
        writer.discard()

    def _running(self) -> EpisodeWriter:
        if self._writer is None:
            raise ValueError("no episode is being recorded; start one first")
        return self._writer

    def _write(self, rows: Iterator[Row]) -> None:
        writer = self._running()
        for images, row in rows:
            backlog = writer.backlog
            self.aligner.stats.max_backlog = max(self.aligner.stats.max_backlog, backlog)
            if backlog > self.config.max_backlog_frames:
                raise RecordingBroken(f"the encoders are {backlog} pictures behind: this machine is too busy")
            try:
                writer.add(images, row)
            except (ValueError, RuntimeError, OSError) as error:  # a picture of another size, a full disk
                raise RecordingBroken(str(error)) from error
