"""Templates of the pages of HTML; what is put into them is escaped unless they say `safe`."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def beside(name: str) -> str:
    """A style or a script of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def policy(style: str | None, script: str | None = None, images: str = "data:") -> str:
    """Content security: nothing may load, and nothing run, but this style and this script.

    Args:
        style: The page's style; None where a library writes styles of its own.
        script: The page's script, which may have a library in a file beside the page where
            `style` is None; None for a page without.
        images: Where images may come from.
    """
    scripts = f"'sha256-{_hash(script)}'" if script is not None else "'none'"
    if style is None:
        scripts += " 'self' file: blob:"
    styles = "'unsafe-inline'" if style is None else f"'sha256-{_hash(style)}'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src {images}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
