"""Self-contained HTML pages: style, tables and pictures in one file, readable in light and dark."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --line: #ccc; --shade: #f4f4f4 }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #444; --shade: #222 }} }}
body {{ font: 15px/1.45 sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .25em .8em; border-bottom: 1px solid var(--line); text-align: left }}
td {{ font-variant-numeric: tabular-nums }}
figure {{ margin: 1em 0 }}
figure div {{ display: flex; gap: .5em }}
figure img {{ min-width: 0; max-width: 100%; flex: 0 1 auto; object-fit: contain }}
pre {{ background: var(--shade); padding: 1em; white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Returns a page of HTML sections under a title."""
    return _PAGE.format(title=html.escape(title), body="\n".join(sections))


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """Returns text, such as commands, with its line breaks."""
    return f"<pre>{html.escape(text)}</pre>"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table."""

    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>\n{line(headings, "th")}\n{body}\n</table></div>'


def plot(figure: Any, caption: str) -> str:
    """Returns a matplotlib figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return _figure([buffer.getvalue()], caption)


def pictures(images: Iterable[UInt8[np.ndarray, "h w 3"]], caption: str) -> str:
    """Returns RGB images side by side under one caption."""
    import cv2

    found = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]
    return _figure(found, caption)


def _figure(pngs: Iterable[bytes], caption: str) -> str:
    text = html.escape(caption)
    data = [base64.b64encode(png).decode() for png in pngs]
    images = "".join(f'<img alt="{text}" src="data:image/png;base64,{one}">' for one in data)
    return f"<figure><div>{images}</div><figcaption>{text}</figcaption></figure>"
