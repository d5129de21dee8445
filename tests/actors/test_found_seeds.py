"""Seeds that have found a bug of ours: without its mend each breaks a rule."""

import pytest

from actors.faults import FAULTS, STALE
from actors.trial import Scenario, Trial

pytestmark = pytest.mark.seeds


def test_seed_2_with_old_readings_what_one_lacks_is_not_over() -> None:
    found = Trial(2, Scenario(faults=(*FAULTS, STALE))).perform()

    assert found.violations == ()
