"""Errors that cross the bridge. Catch these names, nothing wider."""


class BridgeError(Exception):
    """Base of everything the bridge can report."""


class BridgeTimeout(BridgeError):
    """No answer before the deadline. The caller holds and may ask again."""


class SchemaMismatch(BridgeError):
    """The other side speaks another protocol version, message schema or embodiment contract."""


class Refused(BridgeError):
    """The other side understood the request and will not serve it (unknown key, wrong role, stale version)."""


class CorruptData(BridgeError):
    """Bytes that fail their checksum, exceed a limit or do not decode. Nothing of them was used."""


class SpoolFull(BridgeError):
    """The robot's disk holds as many unsent episodes as it may. Nothing was dropped; the new episode was not taken."""


class StaleObservation(BridgeError):
    """A camera frame or arm state is older than the configured limit."""


class RobotFault(Exception):
    """The arm is in FAULT: latched until an operator acknowledges it."""
