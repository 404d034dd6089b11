from __future__ import annotations

from pathlib import Path

from safetensors import safe_open


def checkpoint_has_lm_head(model: str, *, revision: str | None = None) -> bool | None:
    files = list(Path(model).glob("*.safetensors"))
    names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118  It is no mapping.
    return any(name.endswith("lm_head.weight") for name in names) if names else None
