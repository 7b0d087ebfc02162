"""Bytes on each device and on the host: weights, history, state, reserves, by mode."""

from __future__ import annotations

from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.plan import Asked, Place


def places(asked: Asked, layout: Layout, placement: Placement, sessions: int) -> tuple[Place, ...]:
    """Every device in order of rank, then RAM, then NVMe, for so many decoding sessions."""
    raise NotImplementedError
