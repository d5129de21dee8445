"""What some tests need of the system: said loudly where it is not there."""

import os
from typing import NoReturn

import pytest

#: Set where everything has to be tested, as by scripts/test --all.
IS_ALL = "PLACEMENT_TEST_ALL"


def lacking(what: str) -> NoReturn:
    """Skip the test, or fail it where everything has to be tested."""
    text = f"NOT TESTED: {what}"
    if os.environ.get(IS_ALL):
        pytest.fail(text, pytrace=False)
    pytest.skip(text)
