"""Lets SGLang load with `--load-format flashpack`. Importing this package does not import SGLang."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .._serving import LOAD_FORMAT

__all__ = ["register"]


@functools.cache
def register() -> None:
    """Makes the load format known to SGLang, which calls this in each of its processes, because it is an entry point.

    SGLang's formats are an enumeration, but a configuration may hold the class of a loader instead of one of them.
    """
    from sglang.srt.arg_groups.choices import add_load_format_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_load_format_choices([LOAD_FORMAT])
    target = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"
    HookRegistry.register(target, _verify_load_format, HookType.AROUND)


def _verify_load_format(original: Callable[[Any], None], load_config: Any) -> None:
    asked = load_config.load_format
    if isinstance(asked, str) and asked.lower() == LOAD_FORMAT:
        from .loader import FlashPackModelLoader

        load_config.load_format = FlashPackModelLoader
    else:
        original(load_config)
