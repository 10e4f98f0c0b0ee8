"""data.number_formats."""

from datetime import date, datetime, time, timedelta

import pytest

from tabletune.data.number_formats import shown_text

MARCH = datetime(2026, 3, 1)


@pytest.mark.parametrize(
    ("value", "number_format", "text"),
    [
        (MARCH, "DD.MM.YYYY", "01.03.2026"),
        (MARCH, "yyyy-mm-dd", "2026-03-01"),
        (MARCH, "d mmmm yyyy", "1 March 2026"),
        (MARCH, "[$-407]dddd, d. mmm yy", "Sunday, 1. Mar 26"),
        (MARCH, "mm-dd-yy", "2026-03-01"),  # what it shows depends on the computer
        (date(2026, 12, 24), "dd/mm/yyyy", "24/12/2026"),
        (datetime(2026, 3, 1, 9, 5), "yyyy-mm-dd h:mm", "2026-03-01 9:05"),
        (datetime(2026, 3, 1, 9, 5, 7, 250000), "h:mm:ss.00", "9:05:07.25"),
        (time(14, 30), "h:mm AM/PM", "2:30 PM"),
        (time(0, 5), "h:mm AM/PM", "12:05 AM"),
        (time(9, 5, 7), "hh:mm:ss", "09:05:07"),
        (timedelta(hours=30), "[h]:mm:ss", "30:00:00"),
        (timedelta(hours=30), "[h]:mm", "30:00"),
        (timedelta(minutes=90), "[mm]:ss", "90:00"),
    ],
)
def test_dates_and_durations(value, number_format, text):
    assert shown_text(value, number_format) == text


@pytest.mark.parametrize(
    ("value", "number_format", "text"),
    [
        (0.15, "0%", "15%"),
        (0.155, "0.0%", "15.5%"),
        (0.155, "0%", "16%"),
        (12.5, "0.00", "12.50"),
        (12.5, '#,##0.00 "€"', "12.50 €"),
        (12.5, "#,##0.00\\ [$€-407]", "12.50 €"),
        (12.5, "$#,##0.00", "$12.50"),
        (-12.5, "$#,##0.00", "-$12.50"),
        (12.5, '_-* #,##0.00\\ "€"_-;\\-* #,##0.00\\ "€"_-', "12.50 €"),
        (1234567.891, "#,##0.00", "1,234,567.89"),
        (7, "000", "007"),
        (12345678, "00000-000", "12345-678"),
        (12, '"Nr. "000', "Nr. 012"),
        (5, '0" kg"', "5 kg"),
        (1500, '0.0,"k"', "1.5k"),
        (12345, "0.00E+00", "1.23E+04"),
        (1.5, "# ?/?", "1 1/2"),
        (0.25, "?/?", "1/4"),
        (-5, "0;(0)", "(5)"),
        (-5, "#,##0;[Red]-#,##0", "-5"),
        (0, '0;-0;"none"', "none"),
        (-0.004, "0.0", "0.0"),
        (2.5, "0", "3"),
        (3.0, "0.##", "3"),
        (150, '[>100]"big";0', "big"),
        (20, '[>100]"big";0', "20"),
    ],
)
def test_numbers(value, number_format, text):
    assert shown_text(value, number_format) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (1.5, "1.5"),
        (0.1 + 0.2, "0.3"),
        (4006381333931, "4006381333931"),
        (1e-7, "0.0000001"),
        (True, "TRUE"),
        (False, "FALSE"),
        ("=x", "=x"),
        (None, ""),
    ],
)
def test_cells_without_a_format(value, text):
    assert shown_text(value, "General") == text
