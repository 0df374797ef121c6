"""The documentation is true: its commands and code run, its links lead somewhere, its messages exist.

A block ```sh is run line by line, a block ```python as it stands, in a folder where models/Qwen/Qwen-Image is a tiny
model and data/pictures a small dataset. `# refused: text` after a command says that it must fail with that text.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_diffsynth.demo.draw import draw_dataset

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
AFTER_QUICKSTART = ("how_the_split_works", "your_dataset", "lora_formats", "resume", "troubleshooting")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    place: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [Block(f"{page.name}:{text[: m.start()].count(chr(10)) + 1}", m[1], m[2]) for m in found]


def commands(code: str) -> list[str]:
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def run_command(line: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command in this process, so that it finds the session's Ray and no library is imported anew."""
    command, _, refused = line.partition("# refused: ")
    words = shlex.split(command)
    if words[0] == "make":  # what the target does is the business of CI; here, that there is such a target
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert words[0] == "ray-diffsynth", f"{place}: no way to run {line}"
    sys.argv = words
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as end:
        # Ray Train starts five processes a run, so only these two use it; the others train here, as torchrun would.
        if words[1] == "train" and not {"models/my_lora", "--num_workers"} & set(words):
            patched.setenv("TORCHELASTIC_RUN_ID", "docs")
        runpy.run_module("ray_diffsynth", run_name="__main__")
    said = capsys.readouterr()
    if refused:
        assert end.value.code and refused.strip() in said.err, f"{place}: {line}\n{said.err}"
    else:
        assert not end.value.code, f"{place}: {line}\n{said.out}\n{said.err}"


def run_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": name}
    for block in blocks(DOCS / f"{name}.md"):
        if block.language == "sh":
            for line in commands(block.code):
                run_command(line, block.place, capsys)
        elif block.language == "python":
            exec(compile(block.code, block.place, "exec"), names)


@pytest.fixture(scope="module")
def workplace(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "models" / "Qwen").mkdir(parents=True)
    shutil.copytree(tiny_qwen, folder / "models" / "Qwen" / "Qwen-Image")
    rows = draw_dataset(folder / "data" / "pictures", 4).read_text().splitlines()[1:]
    lines = [json.dumps(dict(zip(("image", "prompt"), row.split(",", 1), strict=True))) for row in rows]
    (folder / "data" / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def here(workplace: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield workplace


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_and_code_of_the_pages(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One test, since the pages go on from what the quickstart made."""
    for name in ("quickstart", *AFTER_QUICKSTART):
        run_page(name, capsys)
    assert (here / "models/my_lora/epoch-4.safetensors").exists() and (
        here / "models/longer/step-4.safetensors"
    ).exists()


def test_no_page_is_left_out() -> None:
    """A page with commands or code is one of those run here, or is named by a test of its own."""
    tests = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
    for page in sorted(DOCS.glob("*.md")):
        runnable = [block for block in blocks(page) if block.language in ("sh", "bash", "python")]
        assert not runnable or page.stem in ("quickstart", *AFTER_QUICKSTART) or page.name in tests, page.name


def test_the_readmes_commands_are_the_quickstarts() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.partition("## Your images")[2].partition("\n## ")[0]
    shown = [line for code in re.findall(r"```\w*\n(.*?)```", part, re.DOTALL) for line in commands(code)]
    run = {" ".join(line.split()) for block in blocks(DOCS / "quickstart.md") for line in commands(block.code)}
    assert len(shown) >= 2 and {" ".join(line.split()) for line in shown} <= run


@pytest.mark.parametrize(
    "page",
    [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md"))],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_options_in_the_pages_exist() -> None:
    from dataclasses import fields

    from ray_diffsynth import config
    from ray_diffsynth.config import PreprocessConfig, TrainConfig

    known = {field.name for cls in (PreprocessConfig, TrainConfig) for field in fields(cls)} | {"help", "config"}
    known |= {
        field.name
        for cls in vars(config).values()
        if isinstance(cls, type) and hasattr(cls, "__dataclass_fields__")
        for field in fields(cls)
    }
    for name in ("quickstart", *AFTER_QUICKSTART):
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert set(re.findall(r"(?<![\w-])--(\w+)", text)) - known <= {"head", "runtime"}, (
            name
        )  # of ray start, ray job submit


def test_the_messages_of_troubleshooting_are_in_the_program() -> None:
    headings = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    said = set()
    for path in (ROOT / "ray_diffsynth").rglob("*.py"):
        said |= {_text(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
    for heading in headings:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in heading.split("…") if part.strip()))
        assert any(pattern.search(text) for text in said), heading
    assert len(headings) > 20


def _text(node: ast.AST) -> str:
    """A string of the source, `…` in the place of what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    return "…" if isinstance(node, ast.FormattedValue) else ""
