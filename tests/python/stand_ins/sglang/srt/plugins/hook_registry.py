from __future__ import annotations

import enum
import pkgutil
from collections.abc import Callable
from typing import Any


class HookType(enum.Enum):
    AROUND = "around"


class HookRegistry:
    @staticmethod
    def register(target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        owner, _, name = target.rpartition(".")
        place = pkgutil.resolve_name(owner)
        original = getattr(place, name)
        setattr(place, name, lambda *arguments: hook(original, *arguments))
