"""3DGS files: known bytes, exact round trips, and damaged ones."""

import struct

import pytest
import torch

from sim.splat import ply
from tests.sim.splat.scenes import tabletop

FIELDS = ("means_m", "quats_wxyz", "log_scales", "opacity_logits", "sh")


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_round_trip_is_exact(tmp_path, degree):
    cloud, first, second = tabletop(50, degree), tmp_path / "a.ply", tmp_path / "b.ply"
    ply.write(first, cloud)
    again = ply.read(first, "cube")
    for name in FIELDS:
        assert torch.equal(getattr(again, name), getattr(cloud, name)), name
    assert again.segment_names == ("cube",)
    ply.write(second, again)
    assert first.read_bytes() == second.read_bytes()


def write_by_hand(path, names, rows, kind="float", code="f"):
    head = ["ply", "format binary_little_endian 1.0", "comment by hand", f"element vertex {len(rows)}"]
    head += [f"property {kind} {name}" for name in names] + ["end_header", ""]
    path.write_bytes("\n".join(head).encode() + b"".join(struct.pack(f"<{len(names)}{code}", *row) for row in rows))


def test_a_file_written_by_hand(tmp_path):
    """Coefficients are channel-major in the file: f_rest_0..2 are the red ones of degree 1."""
    names = [name for name in ply.column_names(1) if name not in ply.NORMALS]
    assert names[3:15] == ["f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(9))]
    row = [1, 2, 3, 0.1, 0.2, 0.3, 11, 12, 13, 21, 22, 23, 31, 32, 33, -0.5, -3, -4, -5, 1, 0, 0, 0]
    for kind, code in (("float", "f"), ("double", "d")):
        write_by_hand(tmp_path / "hand.ply", names, [row, row], kind, code)
        cloud = ply.read(tmp_path / "hand.ply")
        assert len(cloud) == 2
        assert cloud.means_m[1].tolist() == [1, 2, 3]
        assert cloud.sh[0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert cloud.sh[0, 1:].tolist() == [[11, 21, 31], [12, 22, 32], [13, 23, 33]]
        assert cloud.opacities[0].item() == pytest.approx(0.3775, abs=1e-4)
        assert cloud.log_scales[0].tolist() == [-3, -4, -5]
        assert cloud.quats_wxyz[0].tolist() == [1, 0, 0, 0]


def test_columns_may_come_in_any_order(tmp_path):
    names = [name for name in ply.column_names(0) if name not in ply.NORMALS]
    row = dict(zip(names, range(1, 15), strict=True))
    write_by_hand(tmp_path / "a.ply", names[::-1], [[row[name] for name in names[::-1]]])
    assert ply.read(tmp_path / "a.ply").quats_wxyz.tolist() == [[11, 12, 13, 14]]


NAMES = [name for name in ply.column_names(0) if name not in ply.NORMALS]


@pytest.mark.parametrize(
    ("names", "row", "message"),
    [
        (NAMES[:-1], [1] * 13, r"lacks \['rot_3'\]"),
        ([*NAMES, "red"], [1] * 15, r"no Gaussian has: \['red'\]"),
        ([*NAMES, "f_rest_0"], [1] * 15, "1 f_rest properties: allowed are 0, 9, 24 and 45"),
        ([*NAMES, *(f"f_rest_{i}" for i in range(6))], [1] * 20, "6 f_rest properties"),
        (NAMES, [float("nan")] + [1] * 13, r"non-finite numbers in \['x'\]"),
        (NAMES, [1] * 10 + [0] * 4, "rotations that are all zero"),
        ([*NAMES, "x"], [1] * 15, "a property twice"),
    ],
)
def test_contents_that_are_no_gaussians(tmp_path, names, row, message):
    write_by_hand(tmp_path / "bad.ply", names, [row])
    with pytest.raises(ValueError, match=message):
        ply.read(tmp_path / "bad.ply")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ply\n", b"plx\n", "not a .ply file"),
        (b"end_header", b"end_footer", "not a .ply file"),
        (b"binary_little_endian", b"ascii", "only 'format binary_little_endian"),
        (b"element vertex 50", b"element vertex 51", "expected 51 x"),
        (b"element vertex 50", b"element face 50", r"has elements \['face'\]"),
        (b"property float x", b"property uchar x", "unexpected header line 'property uchar x'"),
    ],
)
def test_damaged_files(tmp_path, old, new, message):
    path = tmp_path / "bad.ply"
    ply.write(path, tabletop(50))
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        ply.read(path)
    assert str(path) in str(error.value)
