import json
import math

import pytest

from tests.bench import bench_scan


@pytest.mark.slow
def test_the_whole_scan_at_a_tiny_size(monkeypatch, tmp_path):
    out = tmp_path / "scan.json"
    monkeypatch.setattr("sys.argv", ["bench_scan", "--tiny", "--out", str(out), "--work", str(tmp_path / "work")])
    bench_scan.main()
    result = json.loads(out.read_text())
    figures = {name: figure["ours"] for name, figure in result["figures"].items()}
    assert figures["hand_eye_error_mm"] < 1.0
    assert figures["scan_held_out_psnr_db"] > 15
    assert result["figures"]["policy_third_person_psnr_db"]["ratio"] > 1  # even so blurred a scene has the colours
    assert all(math.isfinite(value) for value in figures.values())
    assert set(result["details"]) == {f"{part}_{what}" for part in ("calibrate", "photograph", "fit", "policy")
                                      for what in ("s", "machine")}  # fmt: skip
