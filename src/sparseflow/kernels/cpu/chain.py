"""Fused blocks one after the other in a single native call."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from . import engine
from .records import LinkStruct

if TYPE_CHECKING:
    from .blocks import PreparedConv


class NativeChain:
    """Up to ``size`` prepared blocks, each bound to the results of those before it.

    A block whose input has more nonzeros than its limit is not run, nor is anything behind it.
    """

    def __init__(self, size: int):
        self._links = (LinkStruct * size)()
        self._blocks: list[PreparedConv | None] = [None] * size  # their memory is pointed to

    def link(self, i: int, block: PreparedConv) -> None:
        """Make ``block`` number ``i``."""
        self._links[i], self._blocks[i] = block.link, block
        block.link = self._links[i]  # what the block binds, it binds here

    def limit(self, i: int, most: int) -> None:
        """Set how many nonzeros block ``i`` takes at most."""
        self._links[i].most = most

    def run(self, first: int, n: int) -> int:
        """Run ``n`` blocks from ``first`` on; returns how many ran.

        Raises:
            MemoryError: there was none for the workspace.
        """
        return engine.run_links((LinkStruct * n).from_buffer(self._links, first * ctypes.sizeof(LinkStruct)), n)

    def seen(self, i: int) -> int:
        """The nonzeros that block ``i`` got when it ran last."""
        return self._links[i].seen
