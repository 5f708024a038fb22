"""What no test runs still has to name what is there."""

import ast
import importlib

from tests.commands import ROOT


def module(name: str):
    """A module of ours, or None."""
    path = ROOT / name.replace(".", "/")
    return importlib.import_module(name) if path.with_suffix(".py").exists() or path.is_dir() else None


def test_what_is_taken_of_a_module_of_ours_is_there():
    """Else a function that is renamed ends a script in a fault, an hour after it has begun."""
    missing, found = [], 0
    folders = (".", "data", "fast", "report", "study", "bench")
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}/*.py")):
        tree, ours = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                ours |= {one.asname or one.name: module(one.name) for one in node.names}
            elif isinstance(node, ast.ImportFrom) and module(node.module):
                ours |= {one.asname or one.name: module(f"{node.module}.{one.name}") for one in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and ours.get(node.value.id):
                found += 1
                if not hasattr(ours[node.value.id], node.attr):
                    missing.append(f"{path.name}:{node.lineno}: {node.value.id}.{node.attr}")
    assert missing == [] and found > 300
