"""Values behave as the dataclasses that they would be, whoever asks them first."""

import copy
import pickle
from dataclasses import FrozenInstanceError, astuple, dataclass, field, fields, replace
from typing import Any

import pytest

from placement.value import record, value


@value
class Plain:
    a: int
    b: str = "b"
    c: list[int] = field(default_factory=list, compare=False)
    d: int = field(init=False, default=4)


@dataclass(slots=True, unsafe_hash=True)
class PlainOfOld:
    a: int
    b: str = "b"
    c: list[int] = field(default_factory=list, compare=False)
    d: int = field(init=False, default=4)


@value(kw_only=True, sealed=True)
class Sealed:
    a: int
    b: tuple[int, ...] = ()
    of: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", self.a * 2)


@value(kw_only=True, sealed=True)
class More(Sealed):
    c: int = 3


@value
class Nothing:
    """No fields."""


@record
class Changing:
    a: int
    b: dict[int, int] = field(default_factory=dict)


@value
class Own:
    a: int

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 7

    def __repr__(self) -> str:
        return "own"


@pytest.mark.parametrize("arguments", [(1,), (1, "x"), (1, "x", [5])])
def test_a_value_has_what_a_dataclass_has(arguments: Any) -> None:
    new, old = Plain(*arguments), PlainOfOld(*arguments)

    assert astuple(new) == astuple(old)
    assert repr(new) == repr(old).replace("PlainOfOld", "Plain")
    assert Plain.__match_args__ == PlainOfOld.__match_args__
    assert [each.name for each in fields(new)] == [each.name for each in fields(old)]
    assert hash(new) == hash(Plain(*arguments)) == hash(old)
    assert new == Plain(*arguments)
    assert new != Plain(2)
    assert new != old  # type: ignore[comparison-overlap]
    assert Plain(1, c=[1]) == Plain(1, c=[2])
    assert Plain(1).c is not Plain(1).c
    assert not hasattr(new, "__dict__")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Plain, "missing 1 required positional argument: 'a'"),
        (lambda: Plain(1, x=1), "unexpected keyword argument 'x'"),  # type: ignore[call-arg]
        (lambda: Sealed(1), "positional argument"),  # type: ignore[call-arg]
    ],
)
def test_who_makes_one_wrongly_is_told_how(call: Any, said: str) -> None:
    for _ in range(2):  # the first one writes the method
        with pytest.raises(TypeError, match=said) as caught:
            call()
        assert ".__init__() " in str(caught.value)


def test_a_value_is_equal_or_hashed_before_anything_else_is_asked() -> None:
    @value
    class First:
        a: int

    made = object.__new__(First)
    made.a = 1  # type: ignore[misc]
    assert hash(made) == hash(First(1))
    assert made == First(1)


def test_a_sealed_value_refuses_each_change_and_can_be_copied() -> None:
    sealed = More(a=1, b=(2,), c=5)
    assert (sealed.a, sealed.b, sealed.c, sealed.of) == (1, (2,), 5, 2)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'a'"):
        sealed.a = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'a'"):
        del sealed.a

    for again in (copy.copy(sealed), copy.deepcopy(sealed), replace(sealed)):
        assert again == sealed
        assert again.of == 2
    assert pickle.loads(pickle.dumps(sealed)) == sealed
    assert replace(sealed, a=4).of == 8
    assert sealed != Sealed(a=1, b=(2,))
    assert repr(sealed) == "More(a=1, b=(2,), c=5)"


def test_a_record_changes_and_is_itself_alone() -> None:
    one, other = Changing(1), Changing(1)
    one.b[1] = 2
    one.a = 7
    assert (one.a, one.b, other.b) == (7, {1: 2}, {})
    assert one == one  # noqa: PLR0124
    assert one != Changing(7, {1: 2})
    assert len({one, other}) == 2


def test_what_a_class_has_of_its_own_stays() -> None:
    assert Own(1) == Own(2)
    assert hash(Own(1)) == 7
    assert repr(Own(1)) == "own"


def test_one_without_fields_is_one_too() -> None:
    assert Nothing() == Nothing()
    assert len({Nothing(), Nothing()}) == 1
    assert repr(Nothing()) == "Nothing()"


def test_what_says_only_what_is_equal_has_a_hash_all_the_same() -> None:
    @value
    class Equal:  # noqa: PLW1641  which is the point
        a: int

        def __eq__(self, other: object) -> bool:
            return True

    assert Equal(1) == Equal(2)
    assert hash(Equal(1)) == hash(Equal(1))


def test_what_holds_itself_is_shown() -> None:
    changing = Changing(1)
    changing.b[1] = changing  # type: ignore[assignment]
    assert repr(changing) == "Changing(a=1, b={1: ...})"
