"""The report of a load into a module."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from ._logging import shortened
from ._meta_init import warn_of_meta
from ._paths import StrPath
from ._plan import Plan
from .utils import human_num_elements, logger


@dataclass(frozen=True)
class AssignReport:
    """The result of assign_from_file. A tensor that a module holds under several names counts once."""

    assigned: tuple[str, ...]
    """Names of the module that got their tensors from the file."""
    missing: tuple[str, ...]
    """Parameters, persistent buffers and extra state that the file lacks, without ignored ones."""
    unexpected: tuple[str, ...]
    """Names that only the file has, without ignored ones."""
    left_on_meta: tuple[str, ...]
    """Parameters and buffers that have no memory."""
    stats: dict[str, Any] | None
    """Figures of the reads, as in FlashTensorStorage.stats; None if this process read nothing."""

    def __repr__(self) -> str:
        names = ("missing", "unexpected", "left_on_meta")
        parts = [f"{len(self.assigned)} assigned", *(f"{name}={shortened(getattr(self, name), 5)}" for name in names)]
        if self.stats is not None:
            parts.append(f"{self.stats['requested_bytes']} bytes in {self.stats['seconds']:.3f} s")
        return f"AssignReport({', '.join(parts)})"


def report_of(model: torch.nn.Module, plan: Plan, path: StrPath, stats: dict[str, Any] | None) -> AssignReport:
    """Logs and returns the result of `plan`; warns of tensors that are left on the meta device."""
    if logger.isEnabledFor(logging.INFO):
        elements = human_num_elements(sum(entry.elems for entry in plan.wanted))
        logger.info("assigned %d tensors (%s elements) to %d names", len(plan.wanted), elements, len(plan.slots))
    missing = plan.missing_parameters + plan.missing_buffers
    if plan.unexpected:
        logger.info("not in the model: %s", shortened(plan.unexpected))
    if missing:
        logger.info("not in the file: %s", shortened(missing))
    left_on_meta = warn_of_meta(model, path)
    return AssignReport(tuple(plan.assigned()), tuple(missing), tuple(plan.unexpected), left_on_meta, stats)
