"""The front door: `cotwin COMMAND key=value ...`. Each command is one module with a `main(argv)`."""

import difflib
import importlib
import os
import sys

COMMANDS = {
    "demo": ("learner.demo", "the whole loop on this machine, ending in a report"),
    "cell": ("sim.stand_in.server", "the stand-in cell: an emulated FR3, hand, cube and plate"),
    "up": ("robot.up", "start the nodes of a launch file: cotwin up launch/robot.launch.yaml arg:=value"),
    "record": ("robot.record", "record demonstrations to a LeRobot data set"),
    "eval": ("robot.evaluate", "evaluate a policy server on the robot or the stand-in cell"),
    "camera": ("robot.camera_check", "look at every camera for some seconds: cotwin camera check serials=[...]"),
    "teleop": ("robot.teleop", "move the arm by hand: SpaceMouse, gamepad, keyboard, or a page in a browser"),
    "console": ("robot.console", "the operator's page in a browser: cameras, state, limits, marks, stop"),
    "session-log": ("robot.session_log", "write what all nodes of a robot say to an MCAP file"),
    "robot": ("robot.black_box", "go through a recorded fault again: cotwin robot replay FILE"),
    "data": ("bridge.data_command", "inspect, repair, merge and push data sets"),
    "demos": ("bridge.demo_server", "receive demonstrations from robots into a data set"),
    "twin-demos": ("sim.twin.demos", "scripted demonstrations in the twin to a LeRobot data set"),
    "twin": ("sim.twin.command", "check the twin, replay recordings in it, fit its arm to them"),
    "splat-scene": ("sim.splat.procedural", "write a splat scene sampled from the twin's own shapes"),
    "sft": ("learner.sft", "Stage I: supervised training on real and twin demonstrations"),
    "train": ("learner.train", "Stage II: PPO in the twin with an SFT term on real demonstrations"),
    "fetch": ("learner.fetch", "bring released weights, demonstrations and assets here: cotwin fetch NAME"),
    "runs": ("learner.runs_command", "compare runs: cotwin runs compare A B"),
    "twin-eval": ("learner.twin_eval", "evaluate a checkpoint in the twin or in LIBERO"),
    "cell-eval": (
        "learner.cell_eval",
        "evaluate a checkpoint in the stand-in cell, in lock step, without the robot side",
    ),
    "serve": ("learner.serve", "policy server: answers observations with action chunks, swaps checkpoints"),
    "push": ("learner.push", "announce a checkpoint bundle and deliver it to policy servers"),
    "keys": ("bridge.keys_command", "make, show, allow and revoke keys"),
    "bridge": ("bridge.bridge_command", "look at the bridge live (top) or measure a link (bench)"),
    "report": ("learner.report", "write runs/<name>/report.html from what the stages measured"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "usage: cotwin COMMAND [key=value ...]   (cotwin COMMAND --help for its keys)\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"error: unknown command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""), file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 2
    # Nothing leaves the machine unless its user says so: ROS discovery on loopback, no hub, no usage statistics.
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return importlib.import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
