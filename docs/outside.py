"""For the site: a link that leads out of docs/ is only its text there.

In the repository such links lead to source files; the site has none of them. A test sees to it
that they lead somewhere.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s]*)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page before it is rendered."""
    here = posixpath.dirname(page.file.src_uri)

    def inside_only(link: re.Match[str]) -> str:
        leads_to = posixpath.normpath(posixpath.join(here, link[2]))
        return link[1] if leads_to.startswith("..") else link[0]

    return LINK.sub(inside_only, markdown)
