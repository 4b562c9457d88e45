"""Named policies and what they are assigned to, remembered for whoever places new bytes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from forebay_server.catalog import queries_policies as queries
from forebay_server.catalog.engine import Catalog
from forebay_server.model.placement import Policy, has_work
from forebay_server.model.subjects import parse_subject
from forebay_wire.errors import InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """A policy that a dataset or run has; the field names are those of the message."""

    owner: str
    policy: str


class PolicyBook:
    """Belongs to the event loop; what it remembers is read by any thread."""

    def __init__(self, catalog: Catalog, policies: Mapping[str, Policy], default: str) -> None:
        """*policies* by name; *default* is the name of the one that holds where none is
        assigned."""
        self._catalog = catalog
        self._policies = dict(policies)
        self._default = self._policies[default]
        self._assigned: dict[str, str] = {}

    async def load(self) -> None:
        """Read the assignments; at the start, and now and then where others change them."""
        self._assigned = await self._catalog.read(queries.list_assigned)

    @property
    def policies(self) -> Mapping[str, Policy]:
        return self._policies

    @property
    def default(self) -> Policy:
        return self._default

    def find(self, name: str) -> Policy:
        """The policy called *name*; the default one for an empty name, or for one that the
        configuration no longer has."""
        found = self._policies.get(name or self._default.name)
        if found is None:
            logger.warning("policy %r is assigned, and the configuration does not have it", name)
            return self._default
        return found

    def of(self, owner: str) -> Policy:
        """The policy of ``dataset NAME`` or ``run NAME``; more words may follow."""
        words = owner.split(" ")
        return self.find(self._assigned.get(" ".join(words[:2]), ""))

    async def assign(self, owner: str, policy: str) -> Assignment:
        """Give *owner* a policy, empty: the default one. InvalidRequest for an unknown one.

        One that does not exist yet gets it when it is made: where its bytes land depends on it.
        """
        subject = parse_subject(owner)
        if subject.kind not in ("dataset", "run") or subject.version:
            raise InvalidRequest(
                f"a policy is assigned to a whole dataset or run, not to {subject}: write "
                "'dataset NAME' or 'run NAME'"
            )
        if policy and policy not in self._policies:
            names = ", ".join(sorted(self._policies))
            raise InvalidRequest(f"there is no policy {policy!r}; the daemon has {names}")
        name = str(subject)
        await self._catalog.write(
            lambda connection: queries.assign_policy(connection, name, policy)
        )
        await self.load()
        return Assignment(name, policy or self._default.name)

    def claim(self, kind: str) -> queries.Claim | None:
        """The policies that keep copies in tiers of *kind*; None if no dataset or run has one."""
        wanting = {name for name, one in self._policies.items() if kind in one.copies}
        in_use = {self._default.name, *(self.find(name).name for name in self._assigned.values())}
        if not wanting & in_use:
            return None
        return queries.Claim(frozenset(wanting), frozenset(self._policies), self._default.name)

    async def owners(self, kinds: Collection[str]) -> list[str]:
        """The datasets and runs whose policies may ask for something in tiers of *kinds*."""
        found = [owner for owner in sorted(self._assigned) if has_work(self.of(owner), kinds)]
        if has_work(self._default, kinds):
            found += await self._catalog.read(queries.unassigned_owners)
        return found

    def assignments(self) -> list[Assignment]:
        """All that is assigned, by owner."""
        return [Assignment(*one) for one in sorted(self._assigned.items())]
