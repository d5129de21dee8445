"""How an ask ended that was not answered, as the records of a simulation say it."""

from placement.errors import (
    BadMessage,
    Deadlock,
    HandlerFailed,
    OutcomeUnknown,
    PlacementError,
    Rejected,
)


def outcome_of(error: BaseException) -> tuple[str, str]:
    """How an ask ended that was not answered, and why."""
    reason = f"{type(error).__name__}: {error}"
    match error:
        # A message is found bad where its handler's types look at it: entered.
        case HandlerFailed() | Deadlock() | Rejected() | BadMessage():
            return "failed", reason
        case OutcomeUnknown():
            return "unknown", reason
        case PlacementError() if not error.may_have_happened:
            return "refused", reason
    return "unknown", reason
