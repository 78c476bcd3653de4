"""The package stays layered: no upward import, no circle, lazy imports where they are promised, short functions."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moelab"

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def layers(text: str) -> list[str]:
    """The layers of CONTRIBUTING's table under "The layers", lowest first: the names in the first column of its rows."""
    section = text.split("\n## The layers\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]


LAYERS = [*layers(CONTRIBUTING.read_text()), "__main__"]
HEAVY = {"torch", "triton", "plotly", "ipywidgets", "pandas", "ray", "jupyterlab"}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module below `package`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a module's code."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Every dotted name that a module's code imports, wherever in the code, as `package.module.name`."""
    is_package = path.name == "__init__.py"
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                up = len(here) - node.level + is_package
                base = ".".join([*here[:up], *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def edges(package: Path) -> dict[str, set[str]]:
    """module -> the modules of the same package that it imports (`__version__` alone is no import)."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for name in imported_names(path, module):
            parts = name.split(".")
            if parts[0] != package.name or parts[1:] == ["__version__"]:
                continue
            while ".".join(parts) not in known:
                parts.pop()
            graph[module].add(".".join(parts))
        graph[module].discard(module)
    return graph


def layer(module: str) -> str:
    """The layer of a module: "moelab.kernels.tiles" -> "kernels"; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a higher layer, each as "a imports b". The lazy `moelab` may name any layer; no layer may name it."""
    height = {name: i for i, name in enumerate(LAYERS)}
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        if layer(module)
        for target in sorted(targets)
        if not layer(target) or height[layer(target)] > height[layer(module)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports as the list of its modules, or [] if there is none."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module) :]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if found := walk(target, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


def loaded_after(*statements: str) -> list[set[str]]:
    """The top-level modules that one fresh Python holds after each of these statements, run one after another."""
    show = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    script = "\n".join(["import sys", *(f"{statement}\n{show}" for statement in statements)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    found = {layer(module) for module in modules(PACKAGE)} - {""}
    assert found == set(LAYERS), "give a new module its row in CONTRIBUTING.md, under 'The layers'"
    assert len(set(LAYERS)) == len(LAYERS)


def test_the_layers_are_read_from_their_table() -> None:
    text = "\n## The layers\n`no`\n\n| Layer | For |\n|---|---|\n| `a` | `b` |\n| `c/`, `d_e` | f |\n\n## Next\n| `g` | h |\n"
    assert layers(text) == ["a", "c", "d_e"]


def test_no_upward_import() -> None:
    assert upward_imports(edges(PACKAGE)) == []


def test_no_circle() -> None:
    graph = edges(PACKAGE)
    graph.pop("moelab")  # lazy: it names layers, it does not import them
    assert circle({module: targets - {"moelab"} for module, targets in graph.items()}) == []


def test_tiles_stands_below_the_kernels() -> None:
    assert {target for target in edges(PACKAGE)["moelab.kernels.tiles"] if layer(target) == "kernels"} == set()


def test_only_widgets_imports_ipywidgets() -> None:
    users = {
        layer(module)
        for module, path in modules(PACKAGE).items()
        for name in imported_names(path, module)
        if name.split(".")[0] == "ipywidgets"
    }
    assert users <= {"widgets"}


def test_an_upward_import_and_a_circle_are_seen(tmp_path: Path) -> None:
    """The checks above can fail: relative, late and dynamic imports all count."""
    package = tmp_path / "moelab"
    (package / "kernels").mkdir(parents=True)
    for name, code in {
        "__init__": "",
        "errors": "def f():\n    from . import cli",
        "shapes": "import importlib\nimportlib.import_module('moelab.config')",
        "config": "from moelab.shapes import x",
        "runtime": "from moelab import __version__\nfrom .errors import y",
        "cli": "",
        "kernels/__init__": "",
        "kernels/align": "from ..fused_moe import op\nfrom . import tiles",
        "kernels/tiles": "from moelab import thing",
        "fused_moe": "",
    }.items():
        (package / f"{name}.py").write_text(code)
    graph = edges(package)
    assert upward_imports(graph) == [
        "moelab.errors imports moelab.cli",
        "moelab.kernels.align imports moelab.fused_moe",
        "moelab.kernels.tiles imports moelab",
        "moelab.shapes imports moelab.config",
    ]
    assert set(circle(graph)) == {"moelab.shapes", "moelab.config"}


ARITHMETIC = """errors dtypes runtime formats quantization shared_experts shapes config implementations roofline recordings
    config_files""".split()  # noqa: SIM905


def test_what_is_lazy_loads_nothing_heavy() -> None:
    """In one process, lightest first: what none of them has loaded by the end, no single one loads."""
    statements = ["import moelab", *(f"import moelab.{name}" for name in ARITHMETIC), "import moelab.plots"]
    package, *arithmetic, plots = loaded_after(*statements)
    assert package & (HEAVY | {"numpy"}) == set()
    assert {name: loaded & HEAVY for name, loaded in zip(ARITHMETIC, arithmetic, strict=True) if loaded & HEAVY} == {}
    assert plots & {"torch", "triton", "ipywidgets"} == set()


def test_a_heavy_import_is_seen() -> None:
    before, after = loaded_after("import json", "import pandas")
    assert "pandas" not in before and "pandas" in after


def test_functions_stay_short() -> None:
    """No function over 90 lines, as CONTRIBUTING.md says."""
    spans = {
        f"{path.relative_to(ROOT)}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in modules(PACKAGE).values()
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(spans) > 1000 and {name: lines for name, lines in spans.items() if lines > 90} == {}
