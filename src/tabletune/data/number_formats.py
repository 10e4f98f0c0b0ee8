"""Cells of a workbook as the sheet shows them.

Dates, percentages, currencies, leading zeros, durations. A number format has up to four sections
with semicolons between them: for positive numbers, negative numbers, zero and text. In a section
`0`, `#` and `?` stand for digits, and what is quoted stands for itself (ECMA-376, part 1, 18.8.31).
"""

import re
from datetime import date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from tabletune.data.cells import duration_text

# a quoted text, an escaped character, a space as wide as a character, a filler, [in brackets], or
# one character
TOKEN = re.compile(
    r'"(?P<quoted>[^"]*)"|\\(?P<escaped>.)|(?P<space>_.)|\*(?P<filler>.)|\[(?P<bracket>[^\]]*)\]'
    r"|(?P<general>General)|(?P<noon>AM/PM|A/P)|(?P<date>[ymdhs]+)|(?P<exponent>E[+-])"
    r"|(?P<other>.)",
    re.IGNORECASE | re.DOTALL,
)
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
# these show what the reader's computer is set to, so there is no one text: the international form
# is taken
LOCAL_DATES = ("mm-dd-yy", "m/d/yy", "mm/dd/yy")


def shown_text(value: Any, number_format: str) -> str:
    """The text that a sheet shows for a value with this number format."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, str):
        return value
    if isinstance(value, (datetime, date, time, timedelta)):
        return _date_text(value, number_format)
    return _number_text(value, number_format)


@lru_cache(maxsize=1000)
def _tokens(section: str) -> list[tuple[str, str]]:
    """The tokens of a section, [(kind, text), ...]; kinds are the names of the groups of TOKEN."""
    tokens = []
    for match in TOKEN.finditer(section):
        kind = match.lastgroup or "other"
        tokens.append((kind, match[kind]))
    return tokens


def _sections(number_format: str) -> list[str]:
    """The sections of a number format. A semicolon inside quotes separates nothing."""
    section = r'((?:"[^"]*"|\\.|\[[^\]]*\]|[^;])*)(?:;|$)'
    sections = re.findall(section, number_format, re.DOTALL)
    return sections[:-1] or [number_format]  # the last match is the empty one at the end


# Dates, times and durations


def _date_text(value: datetime | date | time | timedelta, number_format: str) -> str:
    """A date, a time or a duration as its format shows it.

    The first of March 2026 with `dd.mm.yyyy` is 01.03.2026; thirty hours with `[h]:mm` are 30:00.
    """
    section = _sections(number_format)[0]
    tokens = _tokens(section)
    kinds = {kind for kind, _ in tokens}
    # a duration needs [h], [m] or [s], all else a part of a date or time
    if isinstance(value, timedelta):
        if "bracket" not in kinds:
            return duration_text(value)
    elif "date" not in kinds:
        return str(value)
    if section.split(";")[0].casefold() in LOCAL_DATES or "[$-F800]" in section.upper():
        return value.isoformat()[:10] if isinstance(value, date) else str(value)
    parts = [_date_token(value, tokens, position) for position in range(len(tokens))]
    return "".join(parts).strip()


def _date_token(
    value: datetime | date | time | timedelta, tokens: list[tuple[str, str]], position: int
) -> str:
    """What one token of a format shows of a date, a time or a duration; "" for what shows nothing.

    The tokens around it decide what it means: `m` is a month, or after `h` a minute.
    """
    kind, text = tokens[position]
    if kind == "date":
        twelve_hours = any(other_kind == "noon" for other_kind, _ in tokens)
        return _date_part(value, text.lower(), _is_minute(tokens, position), twelve_hours)
    if kind == "noon":
        hour = value.hour if isinstance(value, (datetime, time)) else 0
        morning, afternoon = text.split("/")
        return morning if hour < 12 else afternoon
    if kind == "bracket":
        return _bracket_part(value, text)
    if kind == "other" and text == "0":
        return _fraction_digit(value, [token for _, token in tokens[:position]])
    if kind == "space":
        return " "
    if kind in ("quoted", "escaped", "other") and text != "@":
        return text
    return ""


def _is_minute(tokens: list[tuple[str, str]], position: int) -> bool:
    """Whether an m means minutes: after hours, or before seconds."""
    units = [
        (place, text.lower()[0])
        for place, (kind, text) in enumerate(tokens)
        if kind == "date" or (kind == "bracket" and text.lower().strip("hms") == "")
    ]
    order = [place for place, _ in units].index(position)
    before = units[order - 1][1] if order > 0 else ""
    after = units[order + 1][1] if order + 1 < len(units) else ""
    return before == "h" or after == "s"


def _seconds_of(value: datetime | date | time | timedelta) -> float:
    """The seconds since midnight, or those that a duration takes."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (datetime, time)):
        return value.hour * 3600 + value.minute * 60 + value.second + value.microsecond / 1e6
    return 0.0


def _date_part(
    value: datetime | date | time | timedelta, code: str, minute: bool, twelve_hours: bool
) -> str:
    """One part of a date or time, such as "mm": the month, or the minute."""
    unit = code[0]
    if unit in "hs" or (unit == "m" and minute):
        seconds = int(_seconds_of(value))
        hours = seconds // 3600 % 24
        if twelve_hours:
            hours = (hours - 1) % 12 + 1
        number = {"h": hours, "m": seconds // 60 % 60, "s": seconds % 60}[unit]
        return f"{number:02d}" if len(code) > 1 else str(number)
    if not isinstance(value, date):
        return ""
    if unit == "y":
        return f"{value.year % 100:02d}" if len(code) <= 2 else f"{value.year:04d}"
    if unit == "m":
        name, number = MONTHS[value.month - 1], value.month
    else:
        name, number = DAYS[value.weekday()], value.day
    if len(code) == 5:
        return name[0]
    if len(code) >= 3:
        return name if len(code) > 3 else name[:3]
    return f"{number:02d}" if len(code) == 2 else str(number)


def _bracket_part(value: datetime | date | time | timedelta, text: str) -> str:
    """[h], [m] or [s]: all the hours, minutes or seconds of a duration.

    Other brackets are colours and languages.
    """
    unit = text.lower()
    if not unit or unit.strip(unit[0]) or unit[0] not in "hms":
        return ""
    number = int(_seconds_of(value)) // {"h": 3600, "m": 60, "s": 1}[unit[0]]
    return f"{number:0{len(unit)}d}"


def _fraction_digit(value: datetime | date | time | timedelta, before: list[str]) -> str:
    """The digit of a second's fraction that stands here.

    The third for the third zero after the point.
    """
    digits = len("".join(before)) - len("".join(before).rstrip("0"))
    microseconds = getattr(value, "microsecond", None)
    if microseconds is None:
        microseconds = getattr(value, "microseconds", 0)
    return f"{microseconds:06d}"[digits : digits + 1]


# Numbers


def general_text(value: int | float) -> str:
    """A number without a format: 15 digits, as spreadsheets compute with no more."""
    if isinstance(value, int):
        return str(value)
    text = f"{value:.15g}"
    is_short_in_full = 1e-9 <= abs(value) < 1e21
    if "e" in text and is_short_in_full:
        return f"{Decimal(text):f}"
    return text


def _number_text(value: int | float, number_format: str) -> str:
    """A number as its format shows it.

    1234.5 with `#,##0.00` is 1,234.50; 0.5 with `0%` is 50%; 0 with `0;-0;"none"` is none; -2 with
    `0;(0)` is (2).
    """
    section, absolute = _section_of(value, _sections(number_format))
    tokens = _tokens(section)
    places = [
        place for place, (kind, text) in enumerate(tokens) if kind == "other" and text in "0#?"
    ]
    general = any(kind == "general" for kind, _ in tokens)
    if not places and not general:
        if (
            any(kind == "other" and text == "@" for kind, text in tokens)
            or section == number_format
        ):
            return general_text(value)
        # a section of words alone, such as "none" for zero
        return "".join(map(_literal, tokens)).strip()
    number = abs(Decimal(general_text(value))) if absolute else Decimal(general_text(value))
    number *= Decimal(100) ** sum(kind == "other" and text == "%" for kind, text in tokens)
    sign = "-" if number < 0 else ""
    number = abs(number)
    if general:
        digits = general_text(float(number) if number % 1 else int(number))
        parts = [digits if token[0] == "general" else _literal(token) for token in tokens]
        return (sign + "".join(parts)).strip()
    first, last = places[0], places[-1]
    before = "".join(map(_literal, tokens[:first]))
    after = tokens[last + 1 :]
    while after and after[0] == ("other", ","):  # a comma after the last digit: thousands
        number /= 1000
        after = after[1:]
    body, rounded_to_zero = _digits(number, tokens[first : last + 1])
    if rounded_to_zero:
        sign = ""
    return (sign + before + body + "".join(map(_literal, after))).strip()


def _section_of(value: int | float, sections: list[str]) -> tuple[str, bool]:
    """The section for a number, and whether it shows the number without its sign."""
    conditions = [re.search(r"\[([<>=]+)(-?[\d.]+)\]", section) for section in sections]
    if any(conditions):
        for section, condition in zip(sections, conditions, strict=True):
            if condition is None or _holds(value, condition[1], float(condition[2])):
                return section, False
        return sections[-1], False
    if value < 0 and len(sections) > 1:
        return sections[1], True
    if value == 0 and len(sections) > 2:
        return sections[2], True
    return sections[0], False


def _holds(value: float, comparison: str, limit: float) -> bool:
    results = {"<": value < limit, ">": value > limit, "=": value == limit}
    results |= {"<=": value <= limit, ">=": value >= limit, "<>": value != limit}
    return results.get(comparison, False)


def _literal(token: tuple[str, str]) -> str:
    """What a token of a number's section adds that is no digit."""
    kind, text = token
    if kind in ("quoted", "escaped"):
        return text
    if kind == "space":
        return " "
    if kind == "bracket" and text.startswith("$"):
        # a currency and the language that it is of: [$€-407]
        return text[1:].rpartition("-")[0] if "-" in text else text[1:]
    if kind in ("other", "date", "noon") and text not in ("0", "#", "?", "@"):
        return text
    return ""


def _digits(number: Decimal, tokens: list[tuple[str, str]]) -> tuple[str, bool]:
    """The digits of a number from 0 up, in the places of a section.

    And whether it was rounded to zero.
    """
    pattern = "".join(text if kind in ("other", "exponent") else " " for kind, text in tokens)
    if "/" in pattern:
        return _fraction(number, pattern), False
    if "E" in pattern.upper():
        return _scientific(number, pattern), False
    point = next(
        (place for place, token in enumerate(tokens) if token == ("other", ".")), len(tokens)
    )
    decimals = [token for token in tokens[point + 1 :] if token[0] == "other" and token[1] in "0#?"]
    rounded = number.quantize(Decimal(1).scaleb(-len(decimals)), rounding=ROUND_HALF_UP)
    integer, _, part = f"{rounded:f}".partition(".")
    text = _whole_digits(integer.lstrip("0"), tokens[:point])
    if decimals:
        text += "." + _decimal_digits(part, tokens[point + 1 :])
    return text.removesuffix("."), rounded == 0


def _whole_digits(digits: str, tokens: list[tuple[str, str]]) -> str:
    """The digits before the point, from the right.

    Each place takes one, and the first place takes what is left.
    """
    grouped = ("other", ",") in tokens
    places = [
        place for place, (kind, text) in enumerate(tokens) if kind == "other" and text in "0#?"
    ]
    parts: list[str] = []  # from right to left
    written = 0
    for place in range(len(tokens) - 1, -1, -1):
        kind, text = tokens[place]
        if place not in places:
            if not (kind == "other" and text == ","):
                parts.append(_literal((kind, text)))
            continue
        number_of_digits = len(digits) if place == places[0] else 1
        for _ in range(max(1, number_of_digits)):
            digit = digits[-1:] or {"0": "0", "?": "", "#": ""}[text]
            digits = digits[:-1]
            if digit and grouped and written and written % 3 == 0:
                parts.append(",")
            parts.append(digit)
            written += len(digit)
    return "".join(reversed(parts))


def _decimal_digits(digits: str, tokens: list[tuple[str, str]]) -> str:
    """The digits after the point; a # leaves out a zero at the end."""
    parts: list[str] = []
    for kind, text in tokens:
        if kind == "other" and text in "0#?":
            digit, digits = digits[:1] or "0", digits[1:]
            ends = text in "#?" and not (digit + digits).strip("0")
            parts.append("" if ends else digit)
        else:
            parts.append(_literal((kind, text)))
    return "".join(parts)


def _scientific(number: Decimal, pattern: str) -> str:
    decimals = len(re.findall("[0#?]", pattern.upper().partition("E")[0].partition(".")[2]))
    exponent_digits = len(re.findall("[0#?]", pattern.upper().partition("E")[2]))
    mantissa, _, exponent = f"{number:.{decimals}E}".partition("E")
    power = int(exponent)
    sign = ""
    if power < 0:
        sign = "-"
    elif "E+" in pattern.upper():
        sign = "+"
    return f"{mantissa}E{sign}{abs(power):0{exponent_digits}d}"


def _fraction(number: Decimal, pattern: str) -> str:
    bottom = pattern.partition("/")[2].strip()
    if bottom.isdigit() and int(bottom) > 0:
        # a fixed denominator is not reduced: 2/4 stays 2/4
        top, below = round(Fraction(number) * int(bottom)), int(bottom)
    else:
        fraction = Fraction(number).limit_denominator(10 ** len(re.findall(r"[?#0]", bottom)) - 1)
        top, below = fraction.numerator, fraction.denominator
    if " " not in pattern.partition("/")[0].strip():
        return f"{top}/{below}"
    integer, rest = divmod(top, below)
    if not rest:
        return str(integer)
    return f"{integer} {rest}/{below}" if integer else f"{rest}/{below}"
