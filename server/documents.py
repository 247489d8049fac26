"""Documents from templates: the report page and the model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, select_autoescape

from common.privacy.accounting import shown


def named(group: str) -> str:
    """A group as people read it; records may name none.

    >>> named("north"), named("")
    ('north', '(none named)')
    """
    return group or "(none named)"


FOLDER = Path(__file__).parent / "templates"
BUNDLED = "templates.json"
"""Where a bundle has them, beside this file: bundles hold no files of other kinds."""


def templates() -> Mapping[str, str]:
    """All of them, by file name."""
    if FOLDER.is_dir():
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}
    texts: dict[str, str] = json.loads(FOLDER.with_name(BUNDLED).read_text(encoding="utf-8"))
    return texts


_ENVIRONMENT = Environment(
    loader=DictLoader(templates()),
    autoescape=select_autoescape(["html", "html.jinja"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["epsilon"] = shown
_ENVIRONMENT.filters["named"] = named


def render(template: str, **values: Any) -> str:
    """Fills a template; a missing value is an error, and HTML is escaped."""
    return _ENVIRONMENT.get_template(template).render(**values)
