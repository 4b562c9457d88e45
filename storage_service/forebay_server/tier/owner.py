"""Whose an object tier is: one catalog's at a time, for whoever deletes there goes by its catalog.

``owners/00000001`` and so on, each created only if it does not exist; the last one holds. A catalog
that takes a tier over writes the next one, so of two only one succeeds, and the one before finds
out when it opens the tier again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Final

from forebay_server.tier.store import Tier
from forebay_wire.errors import AlreadyExists, Conflict, InvalidRequest

logger = logging.getLogger(__name__)

OWNERS: Final = "owners/"


@dataclass(frozen=True)
class Owner:
    """Who deletes in an object tier."""

    catalog: str
    """Random name of the catalog: what decides."""
    node: str
    folder: str
    """The data folder when it claimed the tier: for people."""


def claim(tier: Tier, owner: Owner, *, may_be_new: bool = True) -> None:
    """Make *tier* that of *owner* unless it has one; durable on return. Blocks.

    :class:`InvalidRequest` if it is another catalog's; and, unless it *may_be_new*, if nobody has
    claimed it: what the catalog says of its objects is true of another place, or of what was here.
    """
    number, found = _newest(tier)
    if found is None and not may_be_new:
        raise InvalidRequest(
            f"the object tier at {tier.location} is nobody's, the catalog has objects in its own: "
            "was object-url changed, or the store emptied? Give the one that it had. If that is "
            "lost for good, start once with --replaced object: what has copies in other tiers is "
            "stored here again, the rest is given up"
        )
    if found is None:
        try:
            _write(tier, number + 1, owner)
            return
        except AlreadyExists:
            number, found = _newest(tier)
    if found is None or found.catalog == owner.catalog:
        return
    raise InvalidRequest(
        f"the object tier at {tier.location} belongs to the data folder {found.folder} (node "
        f"{found.node}) and not to {owner.folder}: what one deletes, the other would lose. Give "
        "this one an object-url of its own, or, if that data folder is lost, recover: forebay "
        f"recover {tier.location} --data NEW_FOLDER"
    )


def is_claimed(tier: Tier) -> bool:
    """Whether *tier* is any catalog's. Blocks."""
    return _newest(tier)[1] is not None


def take_over(tier: Tier, owner: Owner) -> None:
    """Make *tier* that of *owner*, whose ever it was; durable on return. Idempotent. Blocks.

    :class:`Conflict` if somebody else takes it over at the same time.
    """
    number, found = _newest(tier)
    if found is not None and found.catalog == owner.catalog:
        return
    try:
        _write(tier, number + 1, owner)
    except AlreadyExists:
        raise Conflict(
            f"somebody else has just taken over the object tier at {tier.location}: let only one "
            "recovery run"
        ) from None
    if found is not None:
        logger.warning(
            "the object tier at %s was that of data folder %s (node %s), which can no longer open "
            "it",
            tier.location,
            found.folder,
            found.node,
        )


def _newest(tier: Tier) -> tuple[int, Owner | None]:
    """The last owner's number and who it is; 0 and None in a tier that nobody claimed."""
    numbers = [
        int(text)
        for info in tier.list(OWNERS)
        if (text := info.name.removeprefix(OWNERS)).isdecimal()
    ]
    if not numbers:
        return 0, None
    name = _name(max(numbers))
    try:
        return max(numbers), Owner(**json.loads(tier.get(name)))
    except (ValueError, TypeError) as error:
        raise InvalidRequest(
            f"{name} in the object tier at {tier.location} does not name an owner ({error}): "
            "remove it if the tier is this data folder's"
        ) from error


def _write(tier: Tier, number: int, owner: Owner) -> None:
    tier.put(_name(number), json.dumps(asdict(owner)).encode())


def _name(number: int) -> str:
    return f"{OWNERS}{number:08d}"
