"""The house stays as it was planned: no import climbs, no circle, light doors, short functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moelab"

# Lowest layer first: a module imports only from those before it in this list (CONTRIBUTING.md, "The package").
ROOMS = """
    errors dtypes runtime chips formats quantization shared_experts architectures model_config presets shapes config weights
    quantised_weights call implementations roofline recordings config_files routers routing inputs reference double_double
    torch_layers kernels pipelines fused_moe experts_block module precision measure suites tuner studies plots widgets cli
    __main__
""".split()  # noqa: SIM905
HEAVY = {"torch", "triton", "plotly", "ipywidgets", "pandas", "ray", "jupyterlab"}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module below `package`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every dotted name that a module's code imports, wherever in the code, as `package.module.name`."""
    for node in ast.walk(tree):
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
        for name in imported_names(ast.parse(path.read_text()), module, path.name == "__init__.py"):
            parts = name.split(".")
            if parts[0] != package.name or parts[1:] == ["__version__"]:
                continue
            while ".".join(parts) not in known:
                parts.pop()
            graph[module].add(".".join(parts))
        graph[module].discard(module)
    return graph


def room(module: str) -> str:
    """The room of a module: "moelab.kernels.tiles" -> "kernels"; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports that climb, each as "a imports b". The lazy `moelab` may name any room; no room may name it."""
    floor = {name: i for i, name in enumerate(ROOMS)}
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        if room(module)
        for target in sorted(targets)
        if not room(target) or floor[room(target)] > floor[room(module)]
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


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python holds after running `code`."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_module_has_a_room() -> None:
    rooms = {room(module) for module in modules(PACKAGE)} - {""}
    assert rooms <= set(ROOMS), "a new room: give it its place in ROOMS here and in CONTRIBUTING.md"
    assert {"errors", "runtime", "shapes", "kernels", "fused_moe", "cli"} <= rooms


def test_no_import_climbs() -> None:
    assert climbs(edges(PACKAGE)) == []


def test_no_circle() -> None:
    graph = edges(PACKAGE)
    graph.pop("moelab")  # lazy: it names rooms, it does not import them
    assert circle({module: targets - {"moelab"} for module, targets in graph.items()}) == []


def test_tiles_stands_below_the_kernels() -> None:
    assert {target for target in edges(PACKAGE)["moelab.kernels.tiles"] if room(target) == "kernels"} == set()


def test_only_widgets_imports_ipywidgets() -> None:
    users = {
        room(module)
        for module, path in modules(PACKAGE).items()
        for name in imported_names(ast.parse(path.read_text()), module, path.name == "__init__.py")
        if name.split(".")[0] == "ipywidgets"
    }
    assert users <= {"widgets"}


def test_a_climb_and_a_circle_are_seen(tmp_path: Path) -> None:
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
    assert climbs(graph) == [
        "moelab.errors imports moelab.cli",
        "moelab.kernels.align imports moelab.fused_moe",
        "moelab.kernels.tiles imports moelab",
        "moelab.shapes imports moelab.config",
    ]
    assert set(circle(graph)) == {"moelab.shapes", "moelab.config"}


def test_import_moelab_is_light() -> None:
    assert loaded_after("import moelab") & (HEAVY | {"numpy"}) == set()


ARITHMETIC = [
    "errors",
    "dtypes",
    "runtime",
    "formats",
    "quantization",
    "shared_experts",
    "shapes",
    "config",
    "roofline",
]
ARITHMETIC += ["recordings", "config_files"]


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_rooms_are_light(name: str) -> None:
    assert loaded_after(f"import moelab.{name}") & HEAVY == set()


def test_plots_load_no_torch() -> None:
    assert loaded_after("import moelab.plots") & {"torch", "triton", "ipywidgets"} == set()


def test_light_check_can_fail() -> None:
    assert "pandas" in loaded_after("import pandas")


@pytest.mark.parametrize("path", modules(PACKAGE).values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_short(path: Path) -> None:
    """No function over 90 lines, as CONTRIBUTING.md says."""
    spans = {
        node.name: (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in spans.items() if lines > 90} == {}
