"""Each bug of planted_async.py is reported, under every schedule, by the check that is to find it and with its line."""

import re

import pytest
from planted_async import BEGIN, CHECKS, COMPLETIONS, END, PLANTS, README, check_of, findings


@pytest.mark.parametrize("name", PLANTS)
def test_is_found(name, tmp_path):
    plant = PLANTS[name]
    recorded = re.search(rf"^\| {re.escape(name)} \| {plant.kernel} \| (.*) \|$", readme_table(), re.MULTILINE)
    for completion, (check, message) in findings(plant, tmp_path).items():
        assert check in plant.check.split("|"), f"{completion}: {message or 'not reported'}"
        assert re.search(r"CTA \(\d+, \d+, \d+\),? thread \(\d+", message)
        assert re.search(r"PTX line \d+: ", message)
        assert re.search(rf"(hopper\.cuh|{plant.kernel}\.cu):\d+: ", message)
        assert plant.at in message, message
        assert recorded, "not in the README: run planted_async.py"
        assert recorded[1].split(" | ")[COMPLETIONS.index(completion)] == check


def readme_table():
    return README.read_text().split(BEGIN)[1].split(END)[0]


def test_the_table_is_of_these_bugs():
    names = re.findall(r"^\| (.*?) \| \w+ \| .* \|$", readme_table(), re.MULTILINE)[1:]
    assert names == list(PLANTS)


def test_every_check_finds_something():
    found = {check for plant in PLANTS.values() for check in plant.check.split("|")}
    assert found == set(CHECKS)


def test_other_reports_are_of_no_check():
    assert check_of("division by zero") == ""
