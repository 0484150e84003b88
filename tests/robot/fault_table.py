"""docs/results/robot_faults.json out of what the fault tests noted.

COTWIN_FAULT_TABLE=FILE pytest -m '' tests/robot/test_faults.py; python -m tests.robot.fault_table FILE
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).resolve().parents[2] / "docs" / "results" / "robot_faults.json"


def table(rows: list[dict]) -> dict:
    """Safe: ends in HOLD, FAULT or a refusal. Within its deadline: where one was noted, both in wall seconds."""
    timed = [row for row in rows if "deadline_s" in row]
    figures = {
        "faults_injected": (len(rows), len(rows)),
        "faults_ending_safe": (sum(bool(row.get("ends_in")) for row in rows), len(rows)),
        "faults_within_deadline": (sum(row["took_s"] <= row["deadline_s"] for row in timed), len(timed)),
        "latest_rest_s": (max(row.get("rest_s", 0.0) for row in rows), len(rows)),
        "largest_drift_mm": (max(row.get("drift_mm", 0.0) for row in rows), len(rows)),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    nothing = {"peer": None, "ratio": None, "peer_name": None}
    units = {"latest_rest_s": "s", "largest_drift_mm": "mm"}
    return {
        "name": "robot_faults",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.strip(),
        "command": "COTWIN_FAULT_TABLE=FILE pytest -m '' tests/robot/test_faults.py",
        "machine": {"cpu_cores": os.cpu_count()},
        "figures": {
            name: {"ours": value, **nothing, "unit": units.get(name, "faults"), "n": n}
            for name, (value, n) in figures.items()
        },
        "tables": {"faults": rows},
    }


if __name__ == "__main__":
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    RESULT.write_text(json.dumps(table([row for row in lines if row]), indent=1) + "\n")
