"""What says which versions: requirements.lock, CHANGELOG.md, CITATION.cff."""

import re

import pytest
from packaging.requirements import Requirement

from flags import VERSION
from tests.conftest import ROOT


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_lock_pins_one_version_of_each_requirement_which_satisfies_it(python):
    wanted = {each.name: each.specifier for each in requirements("requirements.txt")}
    pins = [each for each in requirements("requirements.lock")
            if not each.marker or each.marker.evaluate({"python_version": python})]  # fmt: skip
    assert [each.name for each in pins] == list(wanted)
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==" and exact.version in wanted[pin.name], pin


def test_the_changes_and_the_citation_are_of_this_version():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    versions = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == VERSION
