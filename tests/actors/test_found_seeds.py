"""Seeds that have found a bug of ours: without its mend each breaks a rule."""

import pytest

from actors.faults import FAULTS, STALE
from actors.trial import Scenario, Trial

pytestmark = pytest.mark.seeds


def test_seed_2_with_old_readings_what_one_lacks_is_not_over() -> None:
    found = Trial(2, Scenario(faults=(*FAULTS, STALE))).perform()

    assert found.violations == ()


def test_seed_600_comes_to_an_end_when_the_last_members_have_left() -> None:
    """It asked for newer readings for ever, and for more of them each time."""
    found = Trial(600, Scenario(faults=FAULTS)).perform()

    assert found.violations == ()


def test_seed_18_over_nats_what_waits_for_a_save_ends_by_its_deadline() -> None:
    """What an activation asked after a save began its time when that was confirmed."""
    faults = ("churn", "crash", "delay", "store-slow", STALE)
    scenario = Scenario(faults=faults, store="nats", identities=40, requests=1_500)

    assert Trial(18, scenario).perform().violations == ()
