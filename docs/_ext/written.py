"""Pages that are made when the documentation is built, below ``docs/generated``."""

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "generated"


def write_pages(folder: str, pages: Mapping[str, str]) -> None:
    """Write these pages and no others into a folder; what is there already stays."""
    place = FOLDER / folder
    place.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = place / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
