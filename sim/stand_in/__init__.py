import os

os.environ.setdefault("MUJOCO_GL", "egl")  # before anything here imports mujoco: pictures need no display
