"""What stores of tables share: columns of entries and sessions, members as text."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from actors.store_memory import Row
from placement.contracts import SessionRecord
from placement.entry import Acquisition
from placement.topology import Member, SessionId


def columns_of(row: Row) -> tuple[Any, ...]:
    """The columns of an entry, without its identity."""
    lock = row.lock
    return (
        row.owner,
        row.attempt,
        row.fencing_token,
        row.version,
        row.revision,
        None if lock is None else lock.session,
        None if lock is None else lock.procedure,
        row.snapshot,
    )


def row_from(columns: Sequence[Any]) -> Row:
    """The entry whose `columns_of` these are."""
    owner, attempt, token, version, revision, session, procedure, snapshot = columns
    return Row(
        owner=owner,
        attempt=attempt,
        fencing_token=token,
        version=version,
        revision=revision,
        lock=None if session is None else Acquisition(session, procedure),
        snapshot=snapshot,
    )


def record_from(
    session: SessionId,
    ttl_ms: int,
    count: int,
    closed: bool | int,  # noqa: FBT001
) -> SessionRecord:
    """The record of a session, from its columns."""
    return SessionRecord(
        session=session, ttl_ms=ttl_ms, count=count, closed=bool(closed)
    )


def text_of_members(members: Iterable[Member]) -> str:
    """The members as JSON."""
    return json.dumps(
        [
            {
                "session": member.session,
                "kinds": member.kinds,
                "weight": member.weight,
                "draining": member.draining,
            }
            for member in members
        ],
    )


def members_from(text: str) -> tuple[Member, ...]:
    """The members that `text_of_members` has written."""
    return tuple(
        Member(
            session=each["session"],
            kinds=tuple(each["kinds"]),
            weight=each["weight"],
            draining=each["draining"],
        )
        for each in json.loads(text)
    )
