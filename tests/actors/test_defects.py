"""The known-broken variants: each is found, by the rule that it breaks."""

from pathlib import Path

import pytest

from actors.defects import DEFECTS, Variant, variant_of
from actors.faults import FAULTS
from actors.node import PlacementNode
from actors.trial import Scenario, Trial

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


@pytest.mark.seeds
@pytest.mark.parametrize("name", DEFECTS)
def test_a_broken_variant_is_found_by_the_rule_that_it_breaks(name: str) -> None:
    defect = DEFECTS[name]

    found = Trial(defect.seed, Scenario(faults=FAULTS, defect=name)).perform()

    assert found.violations
    assert found.violations[0].rule in defect.rules


def test_each_is_found_within_200_seeds_and_says_in_one_line_what_is_wrong() -> None:
    assert len(DEFECTS) >= 16
    for defect in DEFECTS.values():
        assert 1 <= defect.seed <= 200
        assert defect.description
        assert "\n" not in defect.description


def test_no_name_is_the_sound_cluster() -> None:
    assert type(variant_of("")) is Variant
    assert variant_of("").node_type is PlacementNode
    assert variant_of("no-margin").node_type is not PlacementNode


def test_the_documentation_lists_the_variants_as_they_are() -> None:
    section = ARCHITECTURE.read_text(encoding="utf-8")
    section = section.partition("\n## Known-broken variants\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]

    assert rows == [
        [name, each.description, ", ".join(each.rules), str(each.seed)]
        for name, each in DEFECTS.items()
    ]
