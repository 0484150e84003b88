import os

# Before anything here imports mujoco: pictures need no display, and a software renderer's own worker threads cost more
# than they bring on a machine where every core is wanted.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")
