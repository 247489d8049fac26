"""Documents from templates: the report page and the model card."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from common.privacy.accounting import shown


def named(group: str) -> str:
    """A group as people read it; records may name none.

    >>> named("north"), named("")
    ('north', '(none named)')
    """
    return group or "(none named)"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
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
