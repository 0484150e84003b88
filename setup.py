"""What makes this repository the ROS 2 package `robot` (ament_python). Everything else is in pyproject.toml."""

from glob import glob

from setuptools import setup

setup(
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/robot"]),
        ("share/robot", ["package.xml"]),
        ("share/robot/launch", sorted(glob("launch/*.launch.yaml"))),
    ]
)
