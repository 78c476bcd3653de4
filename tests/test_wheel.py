"""The wheel stands alone: presets, configs and recordings travel inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Run where only the installed wheel and its dependencies are importable; prints what was found as JSON.
PROBE = """
import json
import moelab
from moelab import config_files, recordings, runtime, shapes

configs = sorted(runtime.config_dir().rglob("*.json"))
names = [item.suite for item in recordings.list_recordings()]
print(json.dumps({
    "package": moelab.__file__,
    "checkout": str(runtime.repo_root()),
    "config_dir": str(runtime.config_dir()),
    "data_dir": str(runtime.data_dir()),
    "preset": [shapes.preset("qwen3-30b-a3b").num_experts, shapes.preset("qwen3-30b-a3b").hidden_size],
    "batch_sizes": {path.name: len(config_files.read_config_file(path)) for path in configs},
    "rows": {name: len(recordings.load(name).rows) for name in names},
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command without this process's MOELAB_* and PYTHON*; its stdout. Fails with its output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MOELAB_", "PYTHON"))}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build the checkout's wheel, with no network, into `folder`."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("moelab-*.whl")
    return wheel


def probe(site: Path, elsewhere: Path) -> dict:
    """What PROBE finds. `-S` keeps .pth files out, and with them the editable install of the checkout."""
    paths = [str(site), *dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
    found = run(sys.executable, "-S", "-c", PROBE, cwd=elsewhere, PYTHONPATH=os.pathsep.join(paths))
    return json.loads(found)


def test_wheel_carries_its_data(tmp_path: Path) -> None:
    for name in ("wheel", "site", "elsewhere"):
        (tmp_path / name).mkdir()
    wheel, site = build_wheel(tmp_path / "wheel"), tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "install", "--no-index", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    found = probe(site, tmp_path / "elsewhere")

    assert Path(found["package"]).is_relative_to(site)
    assert found["checkout"] == "None"
    assert Path(found["config_dir"]).is_relative_to(site) and Path(found["data_dir"]).is_relative_to(site)
    assert found["preset"] == [128, 2048]
    assert found["batch_sizes"] and all(found["batch_sizes"].values())
    assert found["rows"] and all(found["rows"].values())

    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "data"):
        here = {f"moelab/_share/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.json")}
        assert here and here <= packed
    assert {f"{p.relative_to(ROOT)}" for p in (ROOT / "moelab").rglob("*.cu")} <= packed
    assert not any(name.startswith(("tests/", "notebooks/")) for name in packed)
