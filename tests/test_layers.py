"""A module imports only modules below it: the layers of docs/architecture.md, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import modelfs

ROOT = Path(modelfs.__file__).parent

# Top to bottom. Modules of one layer do not import each other, but a package's own modules may.
LAYERS: list[set[str]] = [
    {"cli"},
    {"environment", "filesystem"},
    {"daemon", "holder"},
    {"local", "keeper"},
    {"control", "service"},
    {"assembly"},
    {"config"},
    {"fuse"},
    {"contents"},
    {"catalog"},
    {"records"},
    {"layouts"},
    {"snapshots", "faces"},
    {"files", "lookups"},
    {"pins"},
    {"tree", "lockfile"},
    {"model"},
    {"namespaces", "unpacked"},
    {"screen"},
    {"views"},
    {"fetch"},
    {"cache", "stores"},
    {"metrics", "pickles"},
    {"archives"},
    {"types", "privileges"},
    {"listing"},
    {"digest"},
    {"errors"},
]
# Not part of the daemon: may use everything, and nothing may use it.
OUTSIDE = {"testing", "pytest_plugin", "__main__"}
# Only these modules may import these packages.
ONLY_IN = {
    "pyfuse3": {"fuse/pyfuse.py"},
    "boto3": {"stores/aws.py"},
    "botocore": {"stores/aws.py"},
    "huggingface_hub": {"stores/hf.py"},
    "fsspec": {"stores/fsspec.py", "stores/sftp.py", "filesystem.py"},
    "paramiko": {"stores/sftp.py"},
    "google": {"stores/gs.py"},
    "azure": {"stores/az.py"},
    "pycurl": {"fetch/curl.py"},
    "h11": {"fetch/plain.py"},
    "diskcache": {"cache/meta.py"},
    "typer": {"cli/__init__.py", "cli/contents.py"},
    "rich": {"cli/__init__.py", "cli/show.py"},
    "yaml": {"config/document.py"},
    "zstandard": {"archives/zstd.py"},
    "starlette": {"control/app.py"},
    "hypercorn": {"control/app.py"},
}


def layer_of(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if module in names:
            return number
    raise AssertionError(f"modelfs.{module} has no layer: add it to LAYERS and to docs/architecture.md")


def sources() -> list[Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] != "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_a_module_imports_only_modules_below_it() -> None:
    for path in sources():
        own = room(path)
        if own in OUTSIDE:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "modelfs" or len(parts) < 2 or parts[1] == "__version__":
                continue
            assert parts[1] not in OUTSIDE, f"{path} imports {name}"
            assert parts[1] == own or layer_of(parts[1]) > layer_of(own), (
                f"{path} imports {name}, not below it"
            )


def test_a_foreign_library_has_one_home() -> None:
    for path in sources():
        here = str(path.relative_to(ROOT))
        if room(path) in OUTSIDE:
            continue
        for name in imports(path):
            homes = ONLY_IN.get(name.split(".")[0])
            # A package's home may be split into several modules of the same room.
            assert homes is None or here in homes, f"{here} imports {name}: that belongs to {homes}"
