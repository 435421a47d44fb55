"""The project as a whole: its declared dependencies, its recipes, its text and the checks that the suite relies on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from dydit_scale.diffusion.randomness import keyed_seed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("dydit_scale", "data_tools")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RECIPE_COUNT = 31

# Import names that differ from the name of the distribution.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
# The user chooses their builds.
UNPINNED = {"torch", "triton", "xformers"}

# Written in pieces so that this file passes its own test.
NOT_OURS = {
    "machine path": re.compile(
        r"(?<![\w.~$}/-])/(?:" + "work|root|home/[a-z]\\w*|tmp/[a-z]\\w*|Users/[a-z]\\w*" + r")\b", re.IGNORECASE
    ),
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|io|ai|edu|gov|dev|info)\b"),
    "ticket": re.compile(r"\b(?:issue|ticket) " + r"#?\d+\b", re.IGNORECASE),
    "working process": re.compile(r"\b(?:this|previous|next|last) " + r"session\b", re.IGNORECASE),
}


def requirements(python: str) -> list[Requirement]:
    """The direct dependencies, those of the extras among them, that hold on Linux for one Python version."""
    lines = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        lines += extra
    return [need for need in map(Requirement, lines) if holds(need, python)]


def pins(python: str) -> dict[str, SpecifierSet]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    chosen = [pin for pin in found if holds(pin, python)]
    names = [canonicalize_name(pin.name) for pin in chosen]
    assert len(set(names)) == len(names), f"constraints.txt pins a package twice for Python {python}"
    return dict(zip(names, (pin.specifier for pin in chosen), strict=True))


def holds(need: Requirement, python: str) -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    return need.marker is None or need.marker.evaluate(environment)


@pytest.mark.parametrize("python", PYTHONS)
def test_direct_dependencies_are_pinned_once_within_their_range(python: str) -> None:
    pinned = pins(python)
    needed = requirements(python)
    assert len(needed) >= 25
    for need in needed:
        name = canonicalize_name(need.name)
        if name in UNPINNED:
            assert name not in pinned
            continue
        (pin,) = pinned[name]
        assert pin.operator == "==", pin
        assert need.specifier.contains(Version(pin.version)), f"{need}: constraints.txt has {pin.version}"


def test_constraints_leave_the_build_of_torch_open() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"^(?:torch|triton|nvidia|cuda)\b.*", lines, re.MULTILINE) == []


def python_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_packages(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_every_imported_package_is_a_declared_dependency() -> None:
    files = python_files()
    assert len(files) >= 12
    # On 3.11, where all of the standard library that 3.10 has is there too.
    declared = {canonicalize_name(need.name) for need in requirements("3.11")}
    known = declared | set(sys.stdlib_module_names) | set(PACKAGES)
    for path in files:
        for name in imported_packages(path.read_text(encoding="utf-8")):
            distribution = DISTRIBUTIONS.get(name, name)
            assert distribution in known or canonicalize_name(distribution) in known, f"{path}: imports {name}"


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in python_files()}
    assert len(folders) >= 13
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_recipes_parse() -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(recipes) == RECIPE_COUNT, f"found {len(recipes)} recipes: set RECIPE_COUNT in this file"
    if not recipes:
        pytest.skip("no recipes yet")
    for recipe in recipes:
        text = recipe.read_text(encoding="utf-8")
        assert text.startswith("#"), f"{recipe}: a recipe opens with command, hardware, hours and cost ratio"
        assert isinstance(yaml.safe_load(text), dict), f"{recipe}: expected a mapping"


def project_files() -> list[Path]:
    """What git keeps or would keep; without git, everything outside hidden and built folders."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    asked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode == 0 and asked.stdout:
        return sorted(path for name in asked.stdout.split("\0") if name and (path := ROOT / name).is_file())
    skipped = re.compile(r"(?:^|/)(?:\.(?!ci/|github/)[^/]+|__pycache__|build|dist|out|runs|[^/]+\.egg-info)(?:/|$)")
    names = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
    return sorted(ROOT / name for name in names if not skipped.search(name))


def foreign_words(text: str) -> list[str]:
    return [f"{kind}: {hit.group()}" for kind, pattern in NOT_OURS.items() for hit in pattern.finditer(text)]


def test_project_speaks_of_itself_alone() -> None:
    found, read = [], 0
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        read += 1
        found += [f"{path.relative_to(ROOT)}: {words}" for words in foreign_words(text)]
    assert read >= 20
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "runs in /" + "work/main",
        "see '/" + "root/x'",
        "/" + "home/ann/data",
        "write to " + "ann" + "@example.org",
        "fixes issue" + " #12",
        "left for the next" + " session",
    ],
)
def test_foreign_words_are_found(text: str) -> None:
    assert len(foreign_words(text)) == 1


@pytest.mark.parametrize("text", ["framework/main", "x@w", "./work/x", "/workspace/x", "a session cookie", "~/tmp/x"])
def test_own_words_pass(text: str) -> None:
    assert foreign_words(text) == []


def test_annotations_are_checked_under_test() -> None:
    with pytest.raises(TypeCheckError):
        keyed_seed("zero")  # type: ignore[arg-type]


def test_links_of_the_pages_lead_to_files() -> None:
    links = [
        (page, link)
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) >= 2
    broken = [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert not broken
