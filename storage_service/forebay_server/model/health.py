"""When a volume or a store is taken out of service, and when it may serve again."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import Final

GONE: Final = frozenset({errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN})
"""Errors of a whole volume: read-only, unplugged, unmounted. One is enough."""

DEVICE: Final = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ETIMEDOUT})
"""Errors that one bad block gives as well as a dying disk: several in a short time tell."""

UNREACHABLE: Final = frozenset(
    {errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN}
)
"""What stands for a store that answered none of several tries: one call may have had bad luck, a
second one without any answer between tells."""

MAX_UNREACHED: Final = 2
MAX_DEVICE_ERRORS: Final = 4
WITHIN_SECONDS: Final = 60.0
PROBES_TO_RETURN: Final = 2
"""Good probes in a row after device errors; after others the first is enough."""


@dataclass(frozen=True)
class VolumeHealth:
    """What is known of one volume. Moments are seconds of any one clock."""

    reason: str = ""
    """Why it is out of service; empty: it is in service."""
    since: float = 0.0
    errors: tuple[float, ...] = ()
    """Recent device errors."""
    num_unreached: int = 0
    """Calls that nothing answered since the last answer."""
    probes_left: int = 0

    @property
    def in_service(self) -> bool:
        return not self.reason

    def failed(self, code: int, message: str, now: float) -> VolumeHealth:
        """A call ended with the system's error *code* at *now*. Other errors change nothing."""
        if not self.in_service:
            again = 1 if code in GONE else PROBES_TO_RETURN if code in DEVICE else self.probes_left
            return replace(self, probes_left=max(self.probes_left, again))
        if code in UNREACHABLE:
            found = replace(self, num_unreached=self.num_unreached + 1)
            is_out = found.num_unreached >= MAX_UNREACHED
            return VolumeHealth(message, now, probes_left=1) if is_out else found
        if code in GONE:
            return VolumeHealth(message, now, probes_left=1)
        if code not in DEVICE:
            return self
        errors = (*(one for one in self.errors if one > now - WITHIN_SECONDS), now)
        if len(errors) < MAX_DEVICE_ERRORS:
            return replace(self, errors=errors)
        return VolumeHealth(message, now, probes_left=PROBES_TO_RETURN)

    def absent(self, message: str, now: float) -> VolumeHealth:
        """It cannot be used, whatever its errors so far: the first good probe brings it back."""
        return VolumeHealth(message, now, probes_left=1)

    def answered(self) -> VolumeHealth:
        """A call has ended well."""
        return replace(self, num_unreached=0) if self.num_unreached else self

    def probed(self) -> VolumeHealth:
        """A probe, a file written durably, read back and removed, has ended well."""
        if self.in_service:
            return self
        left = self.probes_left - 1
        return VolumeHealth() if left <= 0 else replace(self, probes_left=left)
