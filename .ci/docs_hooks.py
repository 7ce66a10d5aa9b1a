"""A hook of the documentation site (mkdocs.yml): Mermaid comes with the site, and names in the text read well."""

from __future__ import annotations

import re
from typing import Any

SCRIPT = "assets/mermaid.min.js"  # `make site` puts it there; without it, mkdocs-material loads Mermaid from unpkg.com


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Add the script to a page with a diagram. Names to which docstrings refer lose their brackets; options are marked."""
    html = re.sub(r"\[(<code>[\w.~]+</code>)\]", r"\1", html)
    html = re.sub(r"<code>(?=--[\w-]+</code>)", '<code class="flag">', html)
    there = files.get_file_from_path(SCRIPT)
    if there is None or 'class="mermaid"' not in html:
        return html
    return f'{html}\n<script src="{there.url_relative_to(page.file)}"></script>'
