"""Adds to the site the pages and pictures that lie outside docs/, where readers of the repository expect them.

Links work in both places: in the repository they are relative to the file, on the site they lead to the page that the
file becomes.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = (
    *("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *("examples/*.*", "tests/*.md", "benchmarks/*.md", "benchmarks/results/*"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add these files at their path in the repository, as if the repository were docs/."""
    for path in sorted(path for pattern in ELSEWHERE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between docs/ and the rest of the repository into links of the site."""
    is_in_docs = Path(str(page.file.abs_src_path)).is_relative_to(config.docs_dir)
    up = "../" * len(PurePosixPath(page.file.src_uri).parent.parts)
    # docs/ is the root of the site.
    return re.sub(r"\]\(" + re.escape(f"{up}../" if is_in_docs else f"{up}docs/"), f"]({up}", markdown)
