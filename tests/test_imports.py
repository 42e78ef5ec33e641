"""The house has one direction: who may import whom, read from the source of every module."""
import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "medficient_mini"
BELOW = {"files": set(), "machine": set(), "show": {"files"}, "nets": set(),
         "inference": {"nets", "show", "files", "machine"}}
BELOW |= {room: {"inference", *BELOW["inference"]} for room in ("training", "evaluation", "cpu", "userfiles")}
# load_model(precision=…), which hands the loaded network to the CPU room.
EXCEPTIONS = {("inference.checkpoint", "cpu")}


def imports(path: Path):
    """(module, line) of each import of this package in a file, relative ones resolved."""
    folder = ("medficient_mini", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = folder[:len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from ((name.split(".")[1:], node.lineno) for name in names if name.startswith("medficient_mini."))


def test_imports_point_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for target, line in imports(path):
            room, other = parts[0], target[0]
            allowed = room == other or other in BELOW.get(room, ()) or (".".join(parts), other) in EXCEPTIONS
            if not allowed:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {'.'.join(target)}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_within_a_room():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[module] = {".".join(target[:2]) for target, _ in imports(path)
                         if (module, target[0]) not in EXCEPTIONS} - {module}
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"a circle of imports among {sorted(graph)}"
