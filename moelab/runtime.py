"""Where am I: which device runs kernels, under which versions, and where the data lies.

`prepare_triton` decides between the GPU and Triton's interpreter. Triton reads TRITON_INTERPRET once, while it
is imported, so every module that imports triton calls `prepare_triton` first; after that the choice is fixed
for the life of the process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moelab.dtypes import dtype_name, interpreted
from moelab.errors import FolderError, RuntimeModeError

Mode = Literal["gpu", "interpreter", "none"]

_TRUE = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Runtime:
    """What runs kernels in this process.

    mode: "gpu" (compiled kernels), "interpreter" (Triton's interpreter on CPU tensors) or "none".
    device: the torch device type that inputs must be on, "cuda" or "cpu" (ROCm also calls itself "cuda").
    device_name: the current device's as the driver gives it, e.g. "NVIDIA H200"; "cpu" without a GPU.
    reason: one sentence on why this mode was chosen.
    """

    mode: Mode
    device: str
    device_name: str
    reason: str


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@functools.cache
def prepare_triton() -> Runtime:
    """Decide how Triton kernels run here, and set TRITON_INTERPRET accordingly; call before `import triton`.

    A TRITON_INTERPRET that is already in the environment is obeyed. TRITON_DEFAULT_FP_FUSION is fixed to 1
    unless set, because Triton 3.10 changes its default and the fusion of multiply and add changes rounding.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if importlib.util.find_spec("triton") is None:
        return Runtime("none", "cpu", "cpu", "the package triton is not installed")
    if "triton" in sys.modules:
        return _already_imported()
    asked = os.environ.get("TRITON_INTERPRET")
    if asked is not None and asked.strip().lower() in _TRUE:
        return Runtime("interpreter", "cpu", "cpu", f"TRITON_INTERPRET={asked} is set")
    gpu = _gpu_name()
    if gpu:
        return Runtime("gpu", "cuda", gpu, f"torch sees {gpu}")
    if asked is not None:
        return Runtime("none", "cpu", "cpu", f"TRITON_INTERPRET={asked} is set and torch sees no GPU")
    os.environ["TRITON_INTERPRET"] = "1"
    return Runtime("interpreter", "cpu", "cpu", "torch sees no GPU, so Triton's interpreter runs the kernels")


def _already_imported() -> Runtime:
    import triton

    if triton.knobs.runtime.interpret:
        return Runtime("interpreter", "cpu", "cpu", "triton was imported with TRITON_INTERPRET=1")
    gpu = _gpu_name()
    if gpu:
        return Runtime("gpu", "cuda", gpu, f"torch sees {gpu}")
    return Runtime(
        "none", "cpu", "cpu", "triton was imported before moelab, without TRITON_INTERPRET=1, and torch sees no GPU"
    )


def current() -> Runtime:
    """The runtime of this process (decides it if nothing has yet); with a GPU, named after torch's current device."""
    made = prepare_triton()
    if made.mode != "gpu":
        return made
    import torch

    return _named(torch.cuda.current_device())


@functools.cache
def _named(index: int) -> Runtime:
    import torch

    return dataclasses.replace(prepare_triton(), device_name=torch.cuda.get_device_name(index))


def gpu_name() -> str | None:
    """The name of the GPU that kernels would run on, None without one. Asked of the driver where torch is not loaded yet, for
    loading it takes seconds; torch is asked where the driver is no NVIDIA one."""
    asked = os.environ.get("TRITON_INTERPRET", "").strip().lower() in _TRUE
    if "torch" not in sys.modules and not asked and not Path("/dev/kfd").exists():
        try:
            return _name_by_driver(ctypes.CDLL("libcuda.so.1"))
        except OSError:  # no driver, no GPU
            return None
    made = current()
    return made.device_name if made.mode == "gpu" else None


def _name_by_driver(driver: Any) -> str | None:
    """The first device that CUDA_VISIBLE_DEVICES leaves, by the driver's own functions; None where it has none."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetName(name, len(name), device),
    )
    return name.value.decode() if all(call() == 0 for call in calls) else None


def require_kernels(dtype: Any = None) -> Runtime:
    """Return the runtime if Triton kernels of `dtype` (a torch dtype) can run here.

    Raises RuntimeModeError where they cannot: no triton, no GPU with the interpreter off, or bfloat16 under the
    interpreter, whose bf16 arithmetic returns wrong numbers without saying so.
    """
    runtime = prepare_triton()
    if runtime.mode == "none":
        raise RuntimeModeError(
            f"Triton kernels cannot run in this process: {runtime.reason}. Expected a GPU or Triton's interpreter. "
            "Install triton, or start Python with TRITON_INTERPRET=1 in the environment, or import moelab before "
            "triton."
        )
    if runtime.mode == "interpreter" and not interpreted(dtype):
        raise RuntimeModeError(
            f"{dtype_name(dtype)} under Triton's interpreter gives wrong numbers silently, so moelab refuses it. "
            "Expected float16, float32 or float64 here. Cast the inputs, or run on a GPU."
        )
    return runtime


def runs_kernels(dtype: Any = None) -> bool:
    """Whether `require_kernels` lets tensors of this dtype through."""
    mode = current().mode
    return mode == "gpu" or (mode == "interpreter" and interpreted(dtype))


def require_cuda(what: str, instead: str = "") -> None:
    """Raise RuntimeModeError unless an NVIDIA GPU is at hand; `what` names the thing that needs one, `instead` what does not."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise RuntimeModeError(
            f"{what} needs an NVIDIA GPU and a CUDA build of torch; this process has "
            f"{'ROCm' if torch.version.hip else 'no GPU'}. Expected both. Run it on a GPU node"
            f"{f', or {instead}' if instead else ''}."
        )


def device_key(name: str | None = None) -> str:
    """The device name as config files spell it: "NVIDIA H200" -> "NVIDIA_H200"."""
    return (name if name is not None else current().device_name).replace(" ", "_")


def is_version(text: str) -> bool:
    """Whether it is a whole version, three numbers and what packages add: "3.6.0", "3.7.0rc1", "3.6.0.post1+git1234"."""
    added = r"((a|b|rc)[0-9]{1,9})?(\.(post|dev)[0-9]{1,9})*([+-][a-zA-Z0-9.]{1,60})?"
    return re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){2}" + added, text) is not None


def triton_key(version: str | None = None) -> str:
    """The folder of configs for a Triton version: "3.6.0+git1234" -> "triton_3_6_0"."""
    version = version or triton_version() or "unknown"
    return "triton_" + "_".join(re.split(r"[+-]", version)[0].split(".")[:3])


@functools.cache
def triton_version() -> str | None:
    """The installed Triton's version, e.g. "3.6.0"; None without one."""
    return _version("triton")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of what decides a kernel's speed and rounding; None where a package is absent."""
    import torch

    from moelab import __version__

    return {
        "moelab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda or (f"hip {torch.version.hip}" if torch.version.hip else None),
        "driver": _driver(),
    }


@functools.cache
def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def processor() -> str:
    """The host's processor as the system names it, e.g. "Intel(R) Xeon(R) Processor"; the machine type if it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if tracked files differ; MOELAB_GIT_COMMIT overrides."""
    given = os.environ.get("MOELAB_GIT_COMMIT")
    root = repo_root()
    if given or root is None:
        return given or None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if dirty.stdout.strip() else "")


def provenance(seed: int | None = None) -> dict[str, Any]:
    """What a recording must carry about its origin: GPU, driver, versions, commit, date (UTC), seed."""
    return {
        "gpu": current().device_name,
        "mode": current().mode,
        **versions(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": seed,
    }


def repo_root() -> Path | None:
    """The checkout's folder, or None when moelab is installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "data").is_dir() else None


def _share(name: str, variable: str, what: str, to_write: bool = False) -> Path:
    if named := os.environ.get(variable):
        folder = Path(os.path.expanduser(named))  # Path's own raises where there is no such user
        if not to_write and not folder.is_dir():
            raise FolderError(
                f"{variable} is {named!r}, where there is {'a file' if folder.exists() else 'nothing'}. Expected a folder: "
                f"{what}. Correct the variable, or take it out of the environment and {name}/ of moelab's own is read."
            )
        return folder
    root = repo_root()
    return root / name if root else Path(__file__).resolve().parent / "_share" / name


def data_dir() -> Path:
    """Where models/, devices/, recordings/ and upstream/ lie; MOELAB_DATA_DIR overrides. Raises FolderError where that names
    no folder."""
    return _share("data", "MOELAB_DATA_DIR", "the one that holds models/, devices/ and recordings/")


def app_folder() -> Path | None:
    """The folder below which alone the panels may write where a notebook is served as an app, for its page may be opened by
    others than who started it: MOELAB_APP_FOLDER, which `make app` sets, and under a bare Voila tuned/ of the checkout.
    None in JupyterLab, whose user can write anywhere anyway."""
    named = os.environ.get("MOELAB_APP_FOLDER")
    if not named and not os.environ.get("SERVER_SOFTWARE", "").startswith("voila/"):
        return None
    return Path(named or (repo_root() or Path.cwd()) / "tuned").expanduser().resolve()


def config_dir(*, to_write: bool = False) -> Path:
    """Where the triton_X_Y_Z/ folders of tuned configs lie; MOELAB_CONFIG_DIR overrides.

    to_write: the folder may be made by who asks. Otherwise raises FolderError where the variable names no folder.
    """
    return _share("configs", "MOELAB_CONFIG_DIR", "the one that holds the triton_X_Y_Z folders", to_write)
