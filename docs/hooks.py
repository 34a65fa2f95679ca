"""The site's first page is the README, and the example configs are in it."""

from __future__ import annotations

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files, config):
    """Add what lies beside the folder of the documentation."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in sorted((ROOT / "example_configs").iterdir()):
        files.append(File.generated(config, f"example_configs/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that lead there from the repository lead there in the site."""
    markdown = markdown.replace("example_configs)", "example_configs/act.yml)")  # a folder is no page
    return markdown.replace("](docs/", "](").replace("](../../example_configs/", "](../example_configs/")
