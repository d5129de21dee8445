"""The lease guard: whether user code bound to a session may still be entered.

Source: Gray and Cheriton, "Leases", SOSP 1989; and latching, because a late
renewal must not revive what somebody may have given away meanwhile.
"""

from placement.topology import SessionId


class Guard:
    """Open until a time that renewals move on; once it has said no, shut for good.

    `until_ns` is measured from before the first sending of the renewal, and
    leaves a margin before the time to live is over. Asked by several threads
    without a lock: each step reads or writes one attribute, `_is_shut` only ever
    turns true, and one thread extends.
    """

    __slots__ = ("_is_shut", "_until_ns", "session")

    def __init__(self, session: SessionId, *, until_ns: int) -> None:
        self.session = session
        self._until_ns = until_ns
        self._is_shut = False

    def is_open(self, now_ns: int) -> bool:
        """Tell whether user code may be entered now."""
        # Strictly less: at that very time others may begin.
        if self._is_shut or now_ns >= self._until_ns:
            self._is_shut = True
            return False
        return True

    @property
    def until_ns(self) -> int:
        """When it shuts, if nothing extends it."""
        return self._until_ns

    @property
    def is_shut(self) -> bool:
        """Whether it has been shut, or has said no."""
        return self._is_shut

    def extend(self, until_ns: int) -> None:
        """Stay open until then; never sooner than before, and not once shut."""
        if not self._is_shut and until_ns > self._until_ns:
            self._until_ns = until_ns

    def shut(self) -> None:
        """Say no from now on."""
        self._is_shut = True


class Latch:
    """The guard of one activation: its session's, and shut for itself alone."""

    __slots__ = ("_guard", "_is_shut")

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._is_shut = False

    def is_open(self, now_ns: int) -> bool:
        """Tell whether user code of this activation may be entered now."""
        guard = self._guard
        # Asked twice a message: the session's guard is called where it says no.
        return not self._is_shut and (
            (now_ns < guard._until_ns and not guard._is_shut)  # noqa: SLF001
            or guard.is_open(now_ns)
        )

    @property
    def is_shut(self) -> bool:
        """Whether this activation, or its session, has been shut."""
        return self._is_shut or self._guard.is_shut

    def shut(self) -> None:
        """Say no from now on; the session's other activations go on."""
        self._is_shut = True
