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
