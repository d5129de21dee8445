"""Retries: when to try again, growing pauses up to a deadline."""

from placement.value import value


@value(kw_only=True, sealed=True)
class RetryPolicy:
    """Pauses from `first_ns`, each twice the last, `largest_ns` at most.

    Deterministic: what shares a deadline retries in step, which a store actor
    turns into one batch.
    """

    first_ns: int
    largest_ns: int

    def pause_ns(self, tried: int) -> int:
        """The pause after `tried` tries, 1 at least."""
        # A shift by more than this is above any pause, and would only grow.
        return min(self.first_ns << min(tried - 1, 62), self.largest_ns)

    def next_ns(self, tried: int, *, now_ns: int, deadline_ns: int) -> int:
        """When to try again: after the pause, at the deadline at the latest."""
        return min(now_ns + self.pause_ns(tried), max(deadline_ns, now_ns + 1))
