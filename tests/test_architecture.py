"""Holds CONTRIBUTING.md's picture: who imports whom, and which names are public."""

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_knnmt"

# A room is a folder or a top-level file of the package; it may import what is listed here only.
MAY_IMPORT = {
    "adapt": {"data", "evaluation", "models", "pretrained", "retrieval"},
    "__init__": {
        "adapt",
        *("data", "decoding", "pretrained", "retrieval", "system", "training", "translator"),
    },
    "__main__": {"cli"},
    "cli": {"explanation_view", "system", "terminal", "translator"},
    "translator": {
        # system: Translator.load reads one, and makes a translator of it
        *("data", "decoding", "explanation", "models", "pretrained", "retrieval", "system"),
    },
    "explanation": {"data", "decoding", "models", "retrieval"},
    "explanation_view": {"explanation"},
    "system": {
        *("data", "decoding", "files", "models", "packing", "pretrained", "retrieval"),
        *("translator",),
    },
    "packing": {"files", "retrieval"},
    "files": set(),
    "data": {"files"},
    "models": set(),
    "decoding": {"data", "models"},
    "retrieval": {"data", "decoding", "files", "models"},
    "evaluation": {"data", "decoding", "files", "models", "retrieval", "training"},
    "analysis": {"decoding", "evaluation", "models", "retrieval"},
    "pretrained": {"data", "files", "models"},
    "training": {"data", "decoding", "evaluation", "files", "models", "pretrained", "retrieval"},
    "study": {
        *("analysis", "data", "decoding", "evaluation", "files", "retrieval", "system"),
        *("terminal", "translator"),
    },
    "terminal": {"retrieval"},
    "doctor": {
        *("data", "decoding", "evaluation", "files", "models", "pretrained", "retrieval"),
        "terminal",
    },
}
# Third-party libraries that only some rooms may know.
ONLY_IN = {
    "faiss": {"retrieval"},
    "pytorch_lightning": {"data", "training", "evaluation", "terminal"},
    "wandb": {"evaluation"},
    "hydra": {"study"},
    "filelock": {"files"},
    "sentencepiece": {"data"},
    "safetensors": {"pretrained", "retrieval"},
    "matplotlib": {"study"},
    "sacremoses": {"data"},
}


def room_of(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively; the house imports by full names"
            names.add(node.module or "")
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_it_may(file: Path) -> None:
    room = room_of(file)
    allowed = MAY_IMPORT[room] | {room}
    for name in imported_modules(file):
        if name.startswith("lightning_knnmt."):
            assert name.split(".")[1] in allowed, f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_library_stays_in_the_rooms_that_may_know_it(file: Path) -> None:
    for name in imported_modules(file):
        library = name.split(".")[0]
        if library in ONLY_IN:
            assert room_of(file) in ONLY_IN[library], f"{file} imports {name}"


def test_faiss_is_imported_in_one_file() -> None:
    importers = [
        f.name for f in FILES if any(m.split(".")[0] == "faiss" for m in imported_modules(f))
    ]
    assert importers == ["faiss_index.py"]
    (file,) = [f for f in FILES if f.name == "faiss_index.py"]
    at_once = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import)]
    names = [alias.name for node in at_once for alias in node.names]
    assert "faiss" not in names  # which is optional: it is imported on first use


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_file_outgrows_one_head(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "room", sorted(f.parent.name for f in PACKAGE.glob("*/__init__.py")), ids=str
)
def test_public_names_are_what_all_says(room: str) -> None:
    module = importlib.import_module(f"lightning_knnmt.{room}")
    submodules = {f.stem for f in (PACKAGE / room).iterdir()}
    public = {n for n in vars(module) if not n.startswith("_")} - submodules - {"TYPE_CHECKING"}
    on_first_use = {n for n in module.__all__ if n not in vars(module) and hasattr(module, n)}
    assert public | on_first_use == set(module.__all__) - submodules
