"""What can go wrong with NATS."""


class NatsFailure(Exception):
    """NATS could not do it.

    `may_have_happened` is false only where it is certain that nothing was sent.
    """

    def __init__(self, message: str, *, may_have_happened: bool = True) -> None:
        super().__init__(message)
        self.may_have_happened = may_have_happened


class NatsUnreachable(NatsFailure):
    """No server answers, or not in time."""


class NatsRefused(NatsFailure):
    """The server refuses: a wrong password, a certificate, a permission."""


class NatsLost(NatsFailure):
    """The connection was lost meanwhile, or is not there."""
