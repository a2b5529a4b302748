"""Everything public in the Swift library is documented; nothing is forced; one file imports Core ML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from swift.conftest import PACKAGE

LIBRARY = PACKAGE / "Sources" / "DiffusionBridge"
PUBLIC = re.compile(r"\s*public (static |convenience |mutating |private\(set\) )*(struct|class|final|enum|func|init|var|let|typealias|actor)\b")  # fmt: skip  # noqa: E501
INHERITED = ("description: String", "errorDescription", "typealias Element", "func makeAsyncIterator")
FORCED = re.compile(r"\btry!|\bas!|[\w)\]]!(?=[\s.,)\]]|$)")


def undocumented(source: str) -> Iterator[int]:
    """The numbers of lines that declare something public with no `///` before them. What a protocol documents needs
    none; cases of a public enum whose raw value is a text are named by it."""
    lines = source.splitlines()
    for index, line in enumerate(lines):
        if not PUBLIC.match(line) or any(name in line for name in INHERITED):
            continue
        above = index - 1
        while lines[above].strip().startswith("@"):
            above -= 1
        if not lines[above].strip().startswith("///"):
            yield index + 1


def test_everything_public_is_documented() -> None:
    missing = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(LIBRARY.rglob("*.swift"))
        for line in undocumented(path.read_text(encoding="utf-8"))
    ]
    assert missing == []
    assert list(
        undocumented("/// A.\npublic struct A {\n    public let b = 1\n    /// C.\n    @x\n    public init() {}")
    ) == [3]


def test_nothing_is_forced() -> None:
    """No `try!`, no `as!`, no unwrapping with "!": an app must not crash for a damaged file."""
    forced = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted((PACKAGE / "Sources").rglob("*.swift"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORCED.search(re.sub(r'"[^"]*"|//.*', "", line))
    ]
    assert forced == []
    assert FORCED.search("try! x()") and FORCED.search("let a = b[0]!.c") and FORCED.search("x as! Int")
    assert not FORCED.search("if a != b, !c { !d }")


def test_one_file_imports_core_ml_and_one_core_graphics() -> None:
    for module, allowed in (("CoreML", {"CoreMLModel.swift"}), ("CoreGraphics", {"AppleImages.swift"})):
        found = {
            path.name
            for path in LIBRARY.rglob("*.swift")
            if re.search(rf"^\s*import {module}$", path.read_text(encoding="utf-8"), re.MULTILINE)
        }
        assert found == allowed


def test_readme_and_the_workflow_name_the_example() -> None:
    root = Path(__file__).resolve().parents[2]
    example = "swift_bridge/Sources/Example/DrawingView.swift"
    assert (root / example).is_file() and example in (root / "README.md").read_text(encoding="utf-8")
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "swift test" in workflow and "generic/platform=iOS" in workflow and "DiffusionBridge-Package" in workflow
