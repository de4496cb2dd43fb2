"""docs/config.md is what the schema says."""

from megalite.config.docs import TARGET, document


def test_the_page_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == document(), "run: make docs"
