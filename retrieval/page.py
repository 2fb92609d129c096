"""Pages of pictures that open from a file, without a network."""

import base64
import html
import io

from dataset.files import read_image
from utils import UserError

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1rem auto; max-width: 84rem; padding: 0 1rem; }
section { border-top: 1px solid #8885; padding: 1rem 0; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .75rem;
     list-style: none; margin: .5rem 0 0; padding: 0; }
img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882; }
.query img { max-width: 11rem; }
p { margin: 0; overflow-wrap: anywhere; }
"""


def thumbnail(path, side=160):
    """An <img> that holds the picture itself, about 5 kB; in words where it cannot be read."""
    try:
        image = read_image(path)
    except UserError:
        return "<p>cannot be read</p>"
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(path)}" src="data:image/jpeg;base64,{data}">'


def search_page(results):
    """[{"query": path, "neighbours": [{"path", "similarity"}]}] -> the page."""
    sections = []
    for result in results:
        neighbours = "".join(
            f"<li>{thumbnail(found['path'])}<p>{rank}. <b>{found['similarity']:.4f}</b></p>"
            f"<p>{html.escape('/'.join(found['path'].split('/')[-2:]))}</p></li>"
            for rank, found in enumerate(result["neighbours"], start=1)
        )
        query = html.escape(result["query"])
        sections.append(
            f'<section><div class="query">{thumbnail(result["query"])}<p>{query}</p></div>'
            f"<ol>{neighbours}</ol></section>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Search</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><h1>Nearest neighbours</h1>{''.join(sections)}</html>\n"
    )
