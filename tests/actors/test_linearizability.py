import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.linearizability import Add, Misfit, Operation, Read, UnknownAdd, misfit_of


def add(request: str, invoked_ns: int, ended_ns: int, answer: int) -> Add:
    return Add(request=request, invoked_ns=invoked_ns, ended_ns=ended_ns, answer=answer)


def read(request: str, invoked_ns: int, ended_ns: int, answer: int) -> Read:
    return Read(
        request=request, invoked_ns=invoked_ns, ended_ns=ended_ns, answer=answer
    )


def unknown(request: str, invoked_ns: int) -> UnknownAdd:
    return UnknownAdd(request=request, invoked_ns=invoked_ns)


def permuted_into_order(operations: Sequence[Operation]) -> bool:
    """The definition, word by word: is there an order that fits?

    An unknown add that never took effect is one that took effect after all others.
    """
    return any(is_order(order) for order in itertools.permutations(operations))


def is_order(order: Sequence[Operation]) -> bool:
    count = 0
    for place, operation in enumerate(order):
        for later in order[place + 1 :]:
            if (
                not isinstance(later, UnknownAdd)
                and later.ended_ns < operation.invoked_ns
            ):
                return False
        if not isinstance(operation, Read):
            count += 1
        if not isinstance(operation, UnknownAdd) and operation.answer != count:
            return False
    return True


GOOD: dict[str, list[Operation]] = {
    "nothing was asked": [],
    "one after another": [
        read("r0", 0, 1, 0),
        add("a1", 2, 3, 1),
        read("r1", 4, 5, 1),
        add("a2", 6, 7, 2),
        read("r2", 8, 9, 2),
    ],
    "overlapping adds in either order": [
        add("a", 0, 10, 2),
        add("b", 0, 10, 1),
        read("r", 11, 12, 2),
    ],
    "overlapping reads that see before and after": [
        add("a", 0, 10, 1),
        read("new", 1, 5, 1),
        read("old", 1, 5, 0),
    ],
    "where one ends as the other begins, either is first": [
        add("a", 0, 5, 2),
        add("b", 5, 9, 1),
    ],
    "an unknown add that took effect at once": [unknown("u", 0), read("r", 2, 3, 1)],
    "an unknown add that never took effect": [unknown("u", 0), read("r", 50, 51, 0)],
    "an unknown add that took effect long after": [
        unknown("u", 0),
        read("r0", 10, 11, 0),
        read("r1", 12, 13, 1),
    ],
    "unknown adds in a gap, the one that began later not needed": [
        unknown("later", 60),
        unknown("u", 0),
        add("a", 0, 50, 2),
        read("r", 51, 52, 2),
    ],
    "an unknown add that fills the second gap only": [
        unknown("u1", 0),
        unknown("u2", 20),
        read("r1", 5, 10, 1),
        add("a", 30, 40, 3),
    ],
    "only unknown adds": [unknown("u1", 0), unknown("u2", 0)],
}

BAD: dict[str, tuple[str, list[Operation]]] = {
    "a lost update": (
        "b",
        [add("a", 0, 1, 1), add("b", 2, 3, 1)],
    ),
    "two overlapping adds with one answer": (
        "b",
        [add("a", 0, 9, 1), add("b", 0, 9, 1), read("r", 10, 11, 2)],
    ),
    "a stale read": (
        "r",
        [add("a", 0, 1, 1), add("b", 2, 3, 2), read("r", 4, 5, 1)],
    ),
    "a read that goes back behind another read": (
        "old",
        [add("a", 0, 20, 1), read("new", 1, 2, 1), read("old", 3, 4, 0)],
    ),
    "a read from the future": (
        "a",
        [read("r", 0, 1, 1), add("a", 2, 3, 1)],
    ),
    "a read from the future of an unknown add": (
        "r",
        [read("r", 0, 1, 1), unknown("u", 2)],
    ),
    "adds answered against the order of time": (
        "b",
        [add("a", 0, 1, 2), add("b", 2, 3, 1)],
    ),
    "an answered add that is missing in a later read": (
        "r",
        [add("a", 0, 1, 1), read("r", 2, 3, 0)],
    ),
    "an add that counts nobody's": (
        "a",
        [add("a", 0, 1, 2)],
    ),
    "a read of more than was ever added": (
        "r",
        [add("a", 0, 1, 1), read("r", 2, 3, 2)],
    ),
    "an unknown add applied twice": (
        "r",
        [unknown("u", 0), add("a", 1, 2, 2), read("r", 3, 4, 3)],
    ),
    "an answered add applied twice": (
        "b",
        [add("a", 0, 1, 1), add("b", 2, 3, 3)],
    ),
    "an unknown add before it began": (
        "a",
        [add("a", 0, 1, 2), unknown("u", 2)],
    ),
    "an unknown add that was seen and then lost": (
        "later",
        [unknown("u", 0), read("first", 1, 2, 1), read("later", 3, 4, 0)],
    ),
    "unknown adds too late, with enough of them": (
        "a",
        [unknown("u", 0), unknown("late", 20), add("a", 0, 10, 3)],
    ),
    "an add that answers zero": (
        "a",
        [add("a", 0, 1, 0)],
    ),
    "an add that answers zero beside a read of less": (
        "a",
        [read("r", 0, 1, -1), add("a", 0, 1, 0)],
    ),
    "a read of less than nothing": (
        "r",
        [read("r", 0, 1, -1)],
    ),
    "an enormous read": (
        "r",
        [unknown("u", 0), read("r", 1, 2, 10**18)],
    ),
    "a count that began again after a restart": (
        "c",
        [add("a", 0, 1, 1), add("b", 2, 3, 2), add("c", 4, 5, 1)],
    ),
    "a read kept past the add that another read saw": (
        "old",
        [
            add("a", 0, 1, 1),
            add("b", 2, 30, 2),
            read("new", 3, 10, 2),
            read("old", 11, 20, 1),
        ],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_history_that_has_an_order_passes(name: str) -> None:
    assert misfit_of(GOOD[name]) is None
    assert permuted_into_order(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_a_history_that_has_no_order_is_refused_and_says_why(name: str) -> None:
    request, operations = BAD[name]

    misfit = misfit_of(operations)

    assert isinstance(misfit, Misfit)
    assert misfit.operation.request == request
    assert misfit.why.startswith(f"{misfit.operation} was answered ")
    assert not permuted_into_order(operations)


def test_what_is_wrong_is_a_sentence_with_the_operations_and_their_times() -> None:
    assert why("a stale read") == (
        "read r was answered 1, and began at 4 ns,"
        " though add b had been answered 2 by 3 ns"
    )
    assert why("an unknown add before it began") == (
        "add a was answered 2, and ended at 1 ns,"
        " but add u of unknown outcome, which it needs, began at 2 ns"
    )
    assert why("a lost update") == "add b was answered 1, and so was add a"
    assert why("an enormous read") == (
        "read r was answered 1000000000000000000, but nothing can have made the count 2"
    )
    assert why("an add that answers zero") == (
        "add a was answered 0, which is less than it can be"
    )


def why(name: str) -> str:
    misfit = misfit_of(BAD[name][1])
    assert misfit is not None
    return misfit.why


def a_real_history(
    chance: random.Random, size: int, *, unknown_rate: float = 0.3
) -> list[Operation]:
    """Ask a real counter one after another, and widen the times around each ask."""
    count = 0
    operations: list[Operation] = []
    for number in range(size):
        request = f"q{number}"
        invoked_ns = 10 * number - chance.randrange(30)
        ended_ns = 10 * number + chance.randrange(30)
        if chance.random() < 0.4:
            operations.append(read(request, invoked_ns, ended_ns, count))
        elif chance.random() < unknown_rate:
            count += chance.randrange(2)
            operations.append(unknown(request, invoked_ns))
        else:
            count += 1
            operations.append(add(request, invoked_ns, ended_ns, count))
    chance.shuffle(operations)
    return operations


def with_another_answer(
    operations: Sequence[Operation], place: int, shift: int
) -> list[Operation]:
    changed = list(operations)
    operation = changed[place]
    if not isinstance(operation, UnknownAdd):
        changed[place] = replace(operation, answer=operation.answer + shift)
    return changed


@given(st.randoms(use_true_random=False), st.integers(0, 60))
def test_what_a_real_counter_answered_passes(chance: random.Random, size: int) -> None:
    assert misfit_of(a_real_history(chance, size)) is None


@given(
    st.randoms(use_true_random=False),
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(-2, 2),
)
def test_a_changed_answer_is_judged_as_by_trying_every_order(
    chance: random.Random, size: int, place: int, shift: int
) -> None:
    real = a_real_history(chance, size)
    changed = with_another_answer(real, place % size, shift)

    assert permuted_into_order(real)
    assert (misfit_of(changed) is None) == permuted_into_order(changed)


ANSWERED = st.builds(
    lambda make, invoked_ns, length_ns, answer: make(
        "q", invoked_ns, invoked_ns + length_ns, answer
    ),
    st.sampled_from([add, read]),
    st.integers(0, 6),
    st.integers(0, 4),
    st.integers(0, 4),
)
UNKNOWN = st.builds(unknown, st.just("u"), st.integers(0, 6))


@given(st.lists(ANSWERED | UNKNOWN, max_size=6))
def test_any_history_is_judged_as_by_trying_every_order(
    operations: list[Operation],
) -> None:
    assert (misfit_of(operations) is None) == permuted_into_order(operations)


@given(st.randoms(use_true_random=False), st.integers(2, 40), st.integers(0, 39))
def test_an_answer_that_no_unknown_add_explains_is_always_found(
    chance: random.Random, size: int, place: int
) -> None:
    real = a_real_history(chance, size, unknown_rate=0.0)
    adds = [each for each in real if isinstance(each, Add)]
    assume(len(adds) >= 2)
    twin = adds[place % len(adds)]
    other = adds[(place + 1) % len(adds)]

    history = [each for each in real if each is not other]

    assert misfit_of([*history, replace(other, answer=twin.answer)]) is not None


def test_three_hundred_operations_with_forty_unknown_take_one_step_each() -> None:
    # Every one overlaps every other: whoever searched would never end.
    adds: list[Operation] = [add(f"a{n}", 0, 10_000, n) for n in range(1, 261) if n % 7]
    gaps = [unknown(f"u{n}", 0) for n in range(260 // 7)]
    reads = [read(f"r{n}", 0, 10_000, 6 * n) for n in range(40)]

    assert misfit_of([*adds, *gaps, *reads]) is None
    assert misfit_of([*adds, *gaps[1:], *reads]) is not None
