"""Pages as tests: the fenced Python of a Markdown page is run, what it prints is compared.

A ```python block is a script of its own, unless its first line is `# continues…`: then it goes on
where the last one stopped. A ```text block after it is what it must print; `…` stands for anything.
"""

import contextlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass
class Block:
    """One fenced block; `line` is where its code begins."""

    code: str
    line: int
    printed: str | None = None


@dataclass
class Example:
    """A script: one block and those that continue it, under the heading they stand below."""

    heading: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.heading} (line {self.blocks[0].line})"


def examples_of(page: Path) -> list[Example]:
    """The page's scripts, in order."""
    text = page.read_text()
    found: list[Example] = []
    for fence in _FENCE.finditer(text):
        language, content = fence[1], fence[2]
        if language == "python":
            block = Block(content, text.count("\n", 0, fence.start(2)) + 1)
            if not content.startswith("# continues"):
                headings = _HEADING.findall(without_fences(text[: fence.start()]))
                found.append(Example(headings[-1] if headings else page.name))
            found[-1].blocks.append(block)
        elif language == "text":
            found[-1].blocks[-1].printed = content
    return found


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def run(page: Path, example: Example) -> None:
    """Run a script; AssertionError where it prints something else."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in example.blocks:
        output = io.StringIO()
        # Blank lines before it, so that a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(output):
            exec(code, names)
        if block.printed is not None:
            assert is_like(output.getvalue(), block.printed), output.getvalue()


def is_like(printed: str, expected: str) -> bool:
    """Whether the text is as expected, where `…` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    return re.fullmatch(pattern, printed, re.DOTALL) is not None
