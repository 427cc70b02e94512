"""Pages and pictures of the site that lie elsewhere in the repository, where readers of the sources expect them.

A link is right in both places: in the repository relative to its file, on the site to the page that the file becomes.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = (
    *("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *("examples/*.md", "tests/*.md", "benchmarks/*.md", "benchmarks/results/*"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files as if they lay in docs/, at their place in the repository."""
    for path in sorted(path for pattern in ELSEWHERE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between docs/ and the rest of the repository into those of the site."""
    is_in_docs = Path(str(page.file.abs_src_path)).is_relative_to(config.docs_dir)
    up = "../" * len(PurePosixPath(page.file.src_uri).parent.parts)
    # docs/ is the root of the site.
    return re.sub(r"\]\(" + re.escape(f"{up}../" if is_in_docs else f"{up}docs/"), f"]({up}", markdown)
