"""People's votes: what they were asked, what they said, how far they agree, and which model they prefer.

Called by `leyden annotate`, which collects votes, and by `leyden compare`, which shows what they come to. May import
`errors`, `language` and `atomic`, and NumPy, nothing that needs torch. Begin reading at `vote`: an item, its answers, a
vote; then `summary` has all numbers, and `report` shows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.votes.vote import Answer, Item, Vote

__all__ = ["Answer", "Item", "Vote"]

__getattr__ = lazy_exports(__name__, {"vote": "Answer Item Vote"})
