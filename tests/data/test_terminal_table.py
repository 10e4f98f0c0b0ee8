"""The second example: questions about the command line."""

import os
import re
import runpy
import stat
from collections import Counter

from conftest import ROOT
from table_helpers import terminal_rows


def test_table_is_what_its_program_writes():
    rows = runpy.run_path(str(ROOT / "data" / "terminal.py"))["rows"](5000)
    assert rows == terminal_rows()
    assert len({row["question"] for row in rows}) == len(rows) == 5000


def test_answers_about_modes_and_masks_are_right(tmp_path):
    """As the file system itself sees them."""
    file, checked, mask = tmp_path / "file", Counter(), os.umask(0)
    try:
        for row in terminal_rows():
            text = row["question"] + " " + row["answer"]
            if found := re.search(r"umask (\d{3})", text):
                os.umask(int(found[1], 8))
                file.unlink(missing_ok=True)
                file.touch()
                listed = stat.filemode(file.stat().st_mode)[1:]
                assert re.search(r"New files get (\d+) \((.{9})\)", text).groups() == (
                    f"{file.stat().st_mode & 0o777:03o}",
                    listed,
                )
                checked["umask"] += 1
            elif "may" in text:
                letters = re.search(
                    r"(?<![\w-])-?([r-][w-][x-][r-][w-][x-][r-][w-][x-])(?![\w-])", text
                )[1]
                file.touch()
                file.chmod(int(re.search(r"\b([0-7]{3})\b", text)[1], 8))
                assert stat.filemode(file.stat().st_mode)[1:] == letters
                who = re.search(
                    "owner may (.*), the group may (.*), and others may (.*)[.]", text
                ).groups()
                for allowed, rights in zip(
                    who, (letters[:3], letters[3:6], letters[6:]), strict=True
                ):
                    assert (
                        "".join(word[0] if word in allowed else "-" for word in ("read", "write"))
                        == rights[:2]
                    )
                    assert ("execute" in allowed) == ("x" in rights)
                    assert ("nothing" in allowed) == (rights == "---")
                checked["chmod"] += 1
    finally:
        os.umask(mask)
    assert min(checked.values()) > 200


def test_answers_about_numbers_are_right():
    bases, units = (
        {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16},
        ["bytes", "KiB", "MiB", "GiB", "TiB"],
    )
    checked = Counter()
    for row in terminal_rows():
        question, answer = row["question"], row["answer"]
        if found := re.fullmatch(r"What is (\w+) (\w+) in (\w+)\?", question):
            number = int(found[2], bases[found[1]])
            written, powers = re.fullmatch(r".* is (\w+) in .* is ([\d +]+)\.", answer).groups()
            assert int(written, bases[found[3]]) == number == sum(map(int, powers.split(" + ")))
            checked["base"] += 1
        elif found := re.fullmatch(r"How many (\w+) are (\d+) (\w+)\?", question):
            smaller = int(re.search(r"are ([\d,]+)", answer)[1].replace(",", ""))
            assert smaller == int(found[2]) << 10 * (units.index(found[3]) - units.index(found[1]))
            checked["size"] += 1
        elif found := re.fullmatch(r"How many hosts fit into ([\d.]+)/(\d+)\?", question):
            assert int(answer.split()[0].replace(",", "")) == 2 ** (32 - int(found[2])) - 2
            checked["hosts"] += 1
        elif found := re.fullmatch(r"Are ([\d.]+) and ([\d.]+) in one /(\d+) network\?", question):
            one, other = (
                int.from_bytes(map(int, address.split(".")), "big")
                for address in found.groups()[:2]
            )
            assert answer.startswith("Yes") == (
                one >> 32 - int(found[3]) == other >> 32 - int(found[3])
            )
            checked["same network"] += 1
        elif "cron" in question:
            fields = re.search(
                r"([\d*/]+) ([\d*]+) ([\d*]+) ([\d*]+) ([\d*-]+)", question + " " + answer
            ).groups()
            text = question if question.startswith("Write") else answer
            if time := re.search(r" at (\d\d):(\d\d)", text):
                assert fields[:2] == (str(int(time[2])), str(int(time[1])))
            days = re.findall("(Sun|Mon|Tues|Wednes|Thurs|Fri|Satur)day", text)
            numbers = [
                ["Sun", "Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur"].index(day) for day in days
            ]
            assert fields[4] == ("-".join(map(str, numbers)) or "*")
            assert (fields[2] != "*") == ("on day" in text or "once a year" in text)
            checked["cron"] += 1
    assert len(checked) == 5
    assert min(checked.values()) > 100
