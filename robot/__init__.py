"""The robot side: ROS 2 nodes that move the arm, watch it, and record."""

import os
from pathlib import Path

# Before any node joins the graph: it must be the same in every process of it, whoever starts them.
os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(Path(__file__).with_name("fastdds.xml")))
