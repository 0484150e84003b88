"""Compares `fused.project` with `reference.project` on the CPU; run with TRITON_INTERPRET=1 by test_render.py."""

import torch

from sim.splat import fused, reference
from sim.splat.render import invert_rigid
from tests.sim.splat.scenes import cameras, poses, tabletop


def main() -> None:
    cams = cameras(2)
    for degree, antialiased in ((0, True), (3, False)):
        cloud = tabletop(250, degree)
        T = invert_rigid(cams.T_world_cam[:, 1])[:, None] @ poses(2)
        T[1, 0, 2, 3] += 0.6 if degree else -5.0  # some outside the picture or behind the camera
        seen = fused.project(cloud, T.float(), cams.K[:, 1], cams.width, cams.height, antialiased)
        for i in range(2):
            expected = reference.project(cloud, T[i].float(), cams.K[i, 1], cams.width, cams.height, antialiased)
            assert torch.equal(seen.radii_px[i], expected.radii_px), "radii differ"
            drawn = expected.radii_px.amin(dim=-1) > 0
            assert int(drawn.sum()) > 100, f"only {int(drawn.sum())} drawn: the test shows nothing"
            for name in ("means_px", "conics_px", "depths_m", "opacities"):
                torch.testing.assert_close(getattr(seen, name)[i][drawn], getattr(expected, name)[drawn])
            torch.testing.assert_close(seen.colours[i, drawn, :3], expected.colours[drawn])
            assert torch.equal(seen.colours[i, drawn, 3], seen.depths_m[i, drawn])
    print("2 pictures agree")


if __name__ == "__main__":
    main()
