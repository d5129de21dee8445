from placement.retry import RetryPolicy


def test_pauses_grow_twofold_up_to_the_largest() -> None:
    policy = RetryPolicy(first_ns=5, largest_ns=30)

    assert [policy.pause_ns(tried) for tried in (1, 2, 3, 4, 500)] == [
        5,
        10,
        20,
        30,
        30,
    ]


def test_the_last_try_is_at_the_deadline_and_never_in_the_past() -> None:
    policy = RetryPolicy(first_ns=5, largest_ns=30)

    assert policy.next_ns(1, now_ns=100, deadline_ns=200) == 105
    assert policy.next_ns(4, now_ns=100, deadline_ns=110) == 110
    assert policy.next_ns(4, now_ns=100, deadline_ns=90) == 101
