"""Pages of charts and tables that load nothing from elsewhere.

Charts are Plotly's. Its script stands in the page, and the page forbids its browser every request
(Content-Security-Policy).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
:root{color-scheme:light;--ink:#1b2430;--soft:#566070;--line:#dfe3e8;--blue:#1d4f8b}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:0 0 4px}
p{margin:0 0 10px;max-width:78ch}.soft,footer{color:var(--soft)}
section{border-top:1px solid var(--line);padding:20px 0 10px;min-width:0}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));column-gap:36px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:10px;margin:18px 0 22px;padding:0}
.tiles div{border:1px solid var(--line);border-radius:6px;padding:9px 12px}
.tiles dt{color:var(--soft);font-size:13px}.tiles dd{margin:0;font-size:21px;font-weight:600;line-height:1.3}
.tiles small{display:block;font-size:13px;font-weight:400;color:var(--soft)}
.scroll{overflow-x:auto;margin:0 0 10px}.wide figure{min-width:720px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:4px 12px 4px 0;text-align:left;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft)}.right{text-align:right}
.first tbody tr:first-child td{font-weight:600;color:var(--blue)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 18px;margin:4px 0 8px;padding:0;font-size:13.5px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
ol{margin:0 0 10px;padding-left:22px}figure{margin:0 0 10px}summary{cursor:pointer}code{font-size:13px}
footer{border-top:1px solid var(--line);padding-top:14px;font-size:13.5px}
@media(max-width:560px){table{font-size:12.5px}th,td{padding-right:8px}}
@media(hover:none){.wide .drag{pointer-events:none!important}}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A page of `parts`, which are HTML; of them those that are empty are left out."""
    from plotly.offline import get_plotlyjs

    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, lead: str, body: str) -> str:
    """`body` is HTML, `title` and `lead` are text."""
    lead = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Of (what, figure, unit)."""
    cells = (
        f"<div><dt>{escape(what)}</dt><dd>{escape(figure)} <small>{escape(unit)}</small></dd></div>"
        for what, figure, unit in figures
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = (), kind: str = "") -> str:
    """The columns `right` are numbers; with ``kind="first"`` the first row stands out."""

    def line(tag: str, cells: Sequence[str]) -> str:
        own = (f"<{tag}{' class=right' * (i in right)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(own)}</tr>"

    top = f"<thead>{line('th', head)}</thead>" if head else ""
    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Of (colour, words, value). Unlike Plotly's own it wraps on a narrow screen."""
    items = (
        f'<li><i style="background:{colour}"></i>{escape(words)} <b>{escape(value)}</b></li>'
        for colour, words, value in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def bars(x: Sequence, y: Sequence, colour: str | Sequence[str], **more: Any) -> dict[str, Any]:
    """One colour of a stack, or bars with a colour each; lying where `more` gives their `base` or orientation h."""
    return {"type": "bar", "x": x, "y": y, "marker": {"color": colour, "line": {"color": "#fff", "width": 1}}, **more}


def words(x: Sequence, y: Sequence, text: Sequence[str], **more: Any) -> dict[str, Any]:
    """Text on a chart."""
    own = {"type": "scatter", "mode": "text", "x": x, "y": y, "text": text, "hoverinfo": "skip", "cliponaxis": False}
    return own | more


def chart(
    name: str, traces: list[dict[str, Any]], height: int, label: str, xaxis: dict[str, Any], yaxis: dict[str, Any],
    **more: Any,
) -> str:  # fmt: skip
    """A figure as wide as its place, `height` pixels high; `label` says what it shows to those who do not see it.

    Raises ValueError for a key that Plotly does not know.
    """
    from plotly.io import to_html

    grid = {"gridcolor": "#e8ebef", "zeroline": False, "automargin": True, "fixedrange": True}
    for axis in (xaxis, yaxis):
        axis["title"] = {"text": axis.get("title", ""), "font": {"size": 12, "color": "#566070"}}
        axis["showgrid"] = axis.get("showgrid", axis.get("type") != "category")
    layout = {
        "template": {}, "height": height, "margin": {"l": 8, "r": 12, "t": 12, "b": 8}, "barmode": "stack",
        "bargap": 0.3, "showlegend": False, "dragmode": False, "paper_bgcolor": "#fff", "plot_bgcolor": "#fff",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1b2430"}, "hovermode": "closest",
        "xaxis": grid | xaxis, "yaxis": grid | yaxis, **more,
    }  # fmt: skip
    config = {"displayModeBar": False, "responsive": True}
    figure = to_html({"data": traces, "layout": layout}, config, include_plotlyjs=False, full_html=False, div_id=name)
    return f'<figure role="group" aria-label="{escape(label)}">{figure}</figure>'


def paler(colour: str, share: float) -> str:
    """`colour` (``#rrggbb``), a share of the way to white."""
    return "#" + "".join(f"{round(255 - (255 - int(colour[i : i + 2], 16)) * (1 - share)):02x}" for i in (1, 3, 5))
