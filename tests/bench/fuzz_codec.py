"""Ten minutes of fuzzing with each engine: whatever a stranger sends, no crash, no hang, no large allocation.

    python -m tests.bench.fuzz_codec [--seconds 600] [--engines hypothesis atheris]

Both engines feed `survive`; hypothesis changes valid messages and builds strange ones, atheris (where it is installed;
it is no dependency of the project) follows the coverage of `bridge.codec` and `bridge.pictures`.
Writes docs/results/bridge_fuzz.json.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import msgpack
import numpy as np

from bridge.codec import Blob, Limits, Picture, decode, encode, observation_body, observation_from_body
from bridge.errors import BridgeError
from bridge.messages import PROTOCOL_VERSION, Observation
from bridge.pictures import compress, open_picture

RESULT = Path(__file__).resolve().parents[2] / "docs/results/bridge_fuzz.json"
LIMITS = Limits(header_bytes=4096, frames=4, frame_bytes=100_000, items=64, depth=6)
MOST_BYTES = 2_000_000  # of Python's allocations for one message: 1024 levels x 64 items x 8 bytes, and the picture
MOST_CPU_S = 1.0  # for one message


class Seen:
    """What the worst message cost."""

    def __init__(self):
        self.cases = self.decoded = self.peak_bytes = 0
        self.slowest_s = 0.0


SEEN = Seen()


def survive(data: bytes) -> None:
    """Two bytes say how long the header is; the rest is split into raw frames of equal size. The checksum is always
    right: an attacker can compute it. Raises for anything but a message or a BridgeError within the limits."""
    size, count = int.from_bytes(data[:2], "little") & 0x1FFF, (data[1] >> 5 if len(data) > 1 else 0)
    header, rest = data[2 : 2 + size], data[2 + size :]
    step = max(1, len(rest) // max(1, count))
    frames = [rest[k * step : (k + 1) * step] for k in range(count)]
    if not tracemalloc.is_tracing():  # once: starting anew for each message leaks in tracemalloc itself
        tracemalloc.start()
    tracemalloc.reset_peak()
    before_bytes, before_s = tracemalloc.get_traced_memory()[0], time.thread_time()
    try:
        body = decode([zlib.crc32(header).to_bytes(4, "little") + header, *frames], LIMITS, open_picture).body
        SEEN.decoded += 1
        observation_from_body(body, ("wrist",))
    except BridgeError:
        pass
    finally:
        took_s, peak = time.thread_time() - before_s, tracemalloc.get_traced_memory()[1] - before_bytes
    SEEN.cases += 1
    SEEN.peak_bytes, SEEN.slowest_s = max(SEEN.peak_bytes, peak), max(SEEN.slowest_s, took_s)
    if peak > MOST_BYTES or took_s > MOST_CPU_S:
        raise MemoryError(f"a message of {len(data)} bytes took {peak} bytes and {took_s:.2f} s: {data!r}")


def pack(frames: list) -> bytes:
    """What `survive` takes apart again, where the frames are equally long."""
    header = bytes(frames[0])[4:]
    return (len(header) | (len(frames) - 1) << 13).to_bytes(2, "little") + header + b"".join(map(bytes, frames[1:]))


def valid() -> list[bytes]:
    picture = np.zeros((8, 8, 3), np.uint8)
    seen = Observation({"wrist": np.zeros((80, 80, 3), np.uint8)}, np.zeros(7, np.float32), "x", 1, {"wrist": 2})
    small = Observation({"wrist": picture}, np.zeros(7, np.float32), "x", 1, {"wrist": 2})
    bodies = [observation_body(seen), observation_body(small), {"data": Blob(b"x" * 50), "sha256": "0" * 64}]
    bodies += [{"images": {"wrist": compress(picture, coding)}} for coding in ("jpeg", "png")]
    bodies += [{"a": Picture(b"x" * 30, "jpeg", (8, 8, 3))}, {"n": [1, -1, 2**63, 0.5, None, True, "text", b"bytes"]}]
    return [pack(encode("infer", body)) for body in bodies]


for coding in ("jpeg", "png"):  # the libraries' own first use is no message's cost
    opened = compress(np.zeros((8, 8, 3), np.uint8), coding)
    open_picture(memoryview(opened.data), coding, opened.shape)


def with_hypothesis(seconds: float) -> dict:
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    messages, until_s = valid(), time.monotonic() + seconds
    edits = st.lists(st.tuples(st.integers(0, 2**15), st.integers(0, 255)), min_size=1, max_size=12)
    leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    extensions = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=60))
    trees = st.recursive(
        leaves | extensions, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=40
    )

    def edited(number: int, changes: list, cut: int) -> None:
        data = bytearray(messages[number])
        for position, value in changes:
            data[position % len(data)] = value
        survive(bytes(data[: len(data) - cut]))

    def strange(content, frames: list) -> None:
        survive(pack([b"0000" + msgpack.packb(content), *frames]))

    bodies = st.tuples(st.just(PROTOCOL_VERSION), st.text(max_size=5), trees) | trees
    targets = [
        (edited, (st.integers(0, len(messages) - 1), edits, st.just(0) | st.integers(0, 200))),
        (strange, (bodies, st.lists(st.binary(max_size=99), max_size=5))),
        (survive, (st.binary(max_size=5000),)),
    ]
    calm = settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    number = 0
    while time.monotonic() < until_s:
        target, arguments = targets[number % len(targets)]

        @seed(number)
        @calm
        @given(st.tuples(*arguments))
        def once(values):
            target(*values)  # noqa: B023 (it runs before the next round)

        once()
        number += 1
    return {"peak_bytes": SEEN.peak_bytes, "slowest_s": round(SEEN.slowest_s, 4), "cases": SEEN.cases}


def with_atheris(seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(valid()):
            Path(corpus, str(number)).write_bytes(data)
        command = [sys.executable, "-c", INSIDE_ATHERIS, corpus]
        options = [f"-max_total_time={seconds:.0f}", "-max_len=30000", "-timeout=20", "-rss_limit_mb=1024"]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        runs, covered = re.search(r"Done (\d+) runs", done.stderr), re.findall(r"cov: (\d+)", done.stderr)
        if done.returncode or runs is None:
            said = done.stdout[-4000:] + done.stderr[-1000:]
            raise RuntimeError(f"atheris found something (exit {done.returncode}):\n{said}")
        return {"cases": int(runs[1]), "corpus": len(os.listdir(corpus)), "coverage_points": int(covered[-1])}


# In a process of its own, because libFuzzer ends the process that it runs in.
INSIDE_ATHERIS = """
import sys, atheris
with atheris.instrument_imports(include=["bridge"]):
    from tests.bench.fuzz_codec import survive
atheris.Setup(sys.argv, survive)
atheris.Fuzz()
"""


ENGINES = {"hypothesis": with_hypothesis, "atheris": with_atheris}


def main(argv: list[str]) -> int:
    here = [name for name in ENGINES if importlib.util.find_spec(name)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of each engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=here)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    for name in options.engines:
        row = {"seconds": options.seconds} | ENGINES[name](options.seconds)
        print(name, row, flush=True)
        record(options.out, name, row, argv)
    return 0


def record(path: Path, engine: str, row: dict, argv: list[str]) -> None:
    """Beside what the file holds of the other engine."""
    engines = json.loads(path.read_text())["tables"]["engines"] if path.exists() else {}
    engines[engine] = row
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=RESULT.parent, capture_output=True, text=True, check=True).stdout
    cases = sum(engine["cases"] for engine in engines.values())
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    figures = {"codec_fuzz_failures": {"ours": 0, "peer": None, "ratio": None, "unit": "failures", "n": cases}}
    document = {
        "name": "bridge_fuzz",
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "command": f"python -m tests.bench.fuzz_codec {' '.join(argv)}".strip(),
        "machine": {"cpu_cores": os.cpu_count(), "process_memory_mib": memory_mib},
        "figures": figures,
        "tables": {"engines": engines},
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
