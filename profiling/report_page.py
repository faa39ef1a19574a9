"""The report as one HTML file that asks nobody for anything."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

_STYLE = """
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 62em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.text { text-align: left; }
img { max-width: 100%; display: block; margin: 1em 0; }
"""
# The browser itself refuses whatever would be loaded from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; `note` says how to read them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Page:
    """What a report shows, in order.

    Attributes:
        title: of the report.
        tables: also printed on the console.
        pictures: (what it shows, data URI).
    """

    title: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)

    def html(self) -> str:
        """Return the page."""
        body = [f"<h1>{html.escape(self.title)}</h1>"]
        body += map(_table, self.tables)
        body += [
            f'<img alt="{html.escape(what)}" src="{html.escape(uri)}">'
            for what, uri in self.pictures
        ]
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>{''.join(body)}</body></html>\n"
        )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>{note}<table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>\n"
    )


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > 24 else ""
    return f"<td{kind}>{html.escape(text)}</td>"
