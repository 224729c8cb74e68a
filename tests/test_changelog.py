"""Fragments become a release's section, and a malformed one is named."""

from __future__ import annotations

from pathlib import Path

import changelog
import pytest


def planted(tmp_path: Path, **fragments: str) -> Path:
    folder = tmp_path / "changelog.d"
    folder.mkdir()
    (folder / "README.md").write_text("the convention")
    for name, text in fragments.items():
        (folder / (name.replace("_", ".") + ".md")).write_text(text)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog.MARK}\n## 0.1.0 (2026-12-01)\n")
    return tmp_path


def test_the_repositorys_fragments_are_well_formed() -> None:
    changelog.fragments(changelog.ROOT / "changelog.d")


def test_a_release_collects_fragments_by_kind_and_deletes_them(tmp_path: Path) -> None:
    root = planted(tmp_path, crash_fixed="No crash\nany more.", b_added="B.", a_added="A.")
    changelog.release(root, "0.2.0", "2027-01-15")
    assert (root / "CHANGELOG.md").read_text() == (
        f"# Changelog\n\n{changelog.MARK}\n## 0.2.0 (2027-01-15)\n\n### Added\n\n- A.\n- B.\n\n"
        "### Fixed\n\n- No crash any more.\n\n## 0.1.0 (2026-12-01)\n"
    )
    assert [path.name for path in (root / "changelog.d").iterdir()] == ["README.md"]


@pytest.mark.parametrize(("name", "text"), [("thing", "x"), ("thing_improved", "x"), ("thing_fixed", " \n")])
def test_a_malformed_fragment_is_named(tmp_path: Path, name: str, text: str) -> None:
    root = planted(tmp_path, **{name: text})
    with pytest.raises(changelog.FragmentError, match=r"^thing\."):
        changelog.release(root, "0.2.0", "2027-01-15")


def test_a_release_without_news_is_refused(tmp_path: Path) -> None:
    with pytest.raises(changelog.FragmentError, match="nothing to release"):
        changelog.release(planted(tmp_path), "0.2.0", "2027-01-15")
