"""How splat pictures are made. Light: whoever only carries a configuration needs no torch."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

BACKENDS = ("auto", "gsplat", "torch")
PEER_INTERFACES = ("gs_rlinf",)


@dataclass
class SplatConfig:
    """`scene`: the folder with scene.yaml. `device`: "auto" is CUDA where there is one. `cache_fixed`: what is fixed in
    the world is drawn once for a camera that is fixed too. `antialiased`: see `render`. `images_per_call`: how many
    pictures the GPU works on at once, None for what `PAIRS_PER_CALL` allows."""

    scene: str = ""
    backend: str = "auto"
    device: str = "auto"
    cache_fixed: bool = True
    antialiased: bool = False
    images_per_call: int | None = None

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ValueError(f"splat backend {self.backend!r}: allowed are {', '.join(BACKENDS)}")
        if self.images_per_call is not None and self.images_per_call < 1:
            raise ValueError(f"images_per_call {self.images_per_call}: must be at least 1")

    def with_gs_kwargs(self, gs_kwargs: Mapping[str, Any]) -> "SplatConfig":
        """GSEnv's `gs_kwargs` over these: `render_interface`, `cache_table`, `render_bs`, `device`; ValueError for
        others."""
        known = {"cache_table": "cache_fixed", "render_bs": "images_per_call", "device": "device"}
        for key in gs_kwargs:
            if key not in (*known, "render_interface"):
                near = difflib.get_close_matches(key, [*known, "render_interface"], n=1)
                raise ValueError(f"gs_kwargs: unknown key {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        interface = gs_kwargs.get("render_interface", PEER_INTERFACES[0])
        if interface not in PEER_INTERFACES:
            raise ValueError(f"gs_kwargs: render_interface {interface!r}: allowed are {', '.join(PEER_INTERFACES)}")
        return replace(self, **{known[key]: value for key, value in gs_kwargs.items() if key in known})
