"""The frame of a self-contained page: its style sheet for light, dark and narrow screens; tables and pictures."""

import base64
import html
import io
import string
from collections.abc import Sequence

import numpy as np
from PIL import Image


def page(title: str, body: str) -> str:
    """A complete document. `title` is plain text, `body` is HTML."""
    return _PAGE.substitute(title=html.escape(title), body=body)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "scroll") -> str:
    """A table of plain texts that scrolls sideways where it does not fit; the first cell of a row names the row."""

    def cell(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(text)}</{tag.split()[0]}>"

    def line(first: str, others: str, texts: Sequence[str]) -> str:
        cells = [cell(first if texts[0] else "td", texts[0]), *(cell(others, text) for text in texts[1:])]
        return f"<tr>{''.join(cells)}</tr>"

    top = line('th scope="col"', 'th scope="col"', head)
    body = "".join(line('th scope="row"', "td", row) for row in rows)
    return f'<div class="{style}"><table><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def picture(pixels: np.ndarray, side: int, text: str) -> str:
    """An image of uint8 [h, w, channels], shown with its larger side as large as `side`; `text` says what it is."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    width, height = (max(side * n // max(image.size), 1) for n in image.size)
    image.resize((width, height), Image.Resampling.NEAREST if image.width < side else None).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


_PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
 :root { color-scheme: light dark; --text: #1f2933; --ground: #ffffff; --line: #d9dee4;
  --dense: #8593a1; --pruned: #0b6e99; --third: #c2571a; --fourth: #3f7d20; --fifth: #7b4fa3 }
 @media (prefers-color-scheme: dark) { :root { --text: #e3e8ed; --ground: #14181d; --line: #39424c;
  --dense: #8d9aa8; --pruned: #4db6e4; --third: #f08a4b; --fourth: #86c562; --fifth: #c39bea } }
 body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground);
  max-width: 74rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word }
 h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.1rem; margin-top: 2rem }
 table { border-collapse: collapse }
 th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
 th { font-weight: 600 } tbody th { font-weight: 400 }
 th:first-child, td:first-child { text-align: left }
 .keys { margin-top: .5rem } .keys th, .keys td { text-align: left } .keys td { overflow-wrap: anywhere }
 .scroll { overflow-x: auto } figure { margin: .5rem 0 } svg { display: block; max-width: 100%; height: auto }
 @media (max-width: 40rem) { body { margin: 1rem auto } h1 { font-size: 1.25rem }
  th, td { padding: .3rem .4rem } table { font-size: 13px } }
</style></head><body>
<h1>$title</h1>
$body
</body></html>
""")
