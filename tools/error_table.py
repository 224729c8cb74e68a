"""Write the table of errors into docs/api.md: `python tools/error_table.py`.

The table is the gateway's own (`drift_gateway.refusal.CASES`); a test fails while the page has another one.
"""

from __future__ import annotations

from pathlib import Path

from drift_gateway.refusal import error_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
BEGIN = "<!-- written by tools/error_table.py -->\n"
END = "<!-- end -->\n"


def with_table(page: str) -> str:
    """The page with the table as it is now between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, "the page has lost the marks around its table"
    return f"{before}{BEGIN}{error_table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
