"""What every step of a scan does on the command line: settings in, figures out as JSON, errors in one line."""

import json
import sys
from collections.abc import Callable
from typing import Any

from bridge.config import command_line


def run[Config](
    name: str, schema: type[Config], argv: list[str], about: str | None, step: Callable[[Config], dict[str, Any]]
) -> int:
    """`cotwin twin <name>`; settings come from configs/twin-<name>.yaml. 1 where the step could not be made."""
    config = command_line(f"twin-{name}", schema, argv, about or "")
    try:
        print(json.dumps(step(config), indent=2))
    except (ValueError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
