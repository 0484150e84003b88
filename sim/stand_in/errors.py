"""What can go wrong between a person's program and the stand-in cell."""


class CellGone(Exception):
    """The cell did not answer in time."""


class ResetRefused(Exception):
    """The cube is in the hand, or the arm stands where the cube should go. Nothing was moved."""
