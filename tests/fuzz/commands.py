"""Command lines: every option of every command, as the parser has them, with values that no one should pass."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from synthetic import small_problem, synthetic_landscape

from fuzz import Case, Refused, command
from moelab import cli, presets, runtime
from moelab.cli.options import MOST_SEED, MOST_TOKENS
from moelab.tuner import landscape

TEXTS = (
    "", " ", "-", "--", "-1", "0", "x", "X" * 5000, "ü", "\x1b[31m\x1b]0;t\x07", "a\nb", "a\udcffb", "\u202eabc", "%s%n{0}",
    "../../etc", "/", "//", ".", "..", "~", "~nobody", "/dev/null", "/dev/zero", "/proc/self/mem", "a/b", "a/b/c", "x.json",
    "None", "null", "nan", "inf", "1e3", "0x10", "1_000", "3.6.0/x/y", "$(id)", "*", "?", "[", "\\", "'", '"', "C:\\x", "٣",
    "\u2028", "9" * 400, "9" * 5000, "a b", "all", "auto", "fast", "sglang", "vllm", "moelab", "triton", "tma", "uniform",
    "float32", "fp8_w8a8",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "1", "2", "3", "8", "1.5", "1e3", "٣", str(2**31 - 1), str(2**31), str(2**62), str(2**63), str(2**64),
    "-" + "9" * 30, "9" * 400, "9" * 5000, "x", "", " 4", "0x10", "1_0", "nan", "True",
)  # fmt: skip
TIMES = ("5m", "0.001s", "1h", "none", "9" * 400, "0", "-5m", "٥m", "1e9h", "nan", "inf", "5 m", "m", "1001h")
VERSIONS = ("3.6.0", "3.6", "3.6.0/x/y", "3.6.0\n", "3.7.0rc1", "../3.6.0", "٣.٦.٠", "9" * 400 + ".0.0", "3.6.0+git/..")
MEASURED = synthetic_landscape(small_problem((1, 64)), samples=3)
SKIPPED = ("--ray", "--help", "-h")  # a cluster is looked for, for a minute
WRITTEN = ("--out", "--freeze", "--csv")  # as root, anything would be written anywhere
WITHIN = {"--batch-size": (1, MOST_TOKENS), "--batch-sizes": (1, MOST_TOKENS), "--seed": (0, MOST_SEED), "--tp-size": (1, None),
          "--tp": (1, None), "--ep-size": (1, None), "--ep": (1, None)}  # fmt: skip


class Ground:
    """A folder with something of each kind that commands read, and one that they may write into."""

    def __init__(self, folder: Path) -> None:
        self.given, self.out, self.cwd = (folder / name for name in ("given", "out", "cwd"))
        for place in (self.given, self.cwd):
            place.mkdir(parents=True, exist_ok=True)
        shutil.copytree(runtime.config_dir(), self.given / "configs", dirs_exist_ok=True)
        self.landscape = landscape.write(MEASURED, self.given / "land.parquet")
        self.config = next((self.given / "configs").rglob("E=*.json"))
        self.model = Path(shutil.copy(runtime.data_dir() / "models" / "qwen3-30b-a3b.json", self.given / "model.json"))
        (self.given / "empty").write_bytes(b"")
        (self.given / "bytes").write_bytes(bytes(range(256)) * 4)
        (self.given / "closed").mkdir(exist_ok=True)
        if not (self.given / "pipe").exists():
            os.mkfifo(self.given / "pipe")
        with contextlib.chdir(self.cwd):
            command("tune", "--replay", self.landscape, "--out", folder / "run")
        self.journal = next((folder / "run" / "runs").glob("*.jsonl"))
        self.before = self.listed()

    def paths(self) -> list[str]:
        """Paths of all kinds, and none."""
        found = (self.given, *sorted(self.given.iterdir()), self.config, self.journal, self.out, self.cwd / "no" / "x")
        return [str(path) for path in found]

    def listed(self) -> list[tuple[str, int, int]]:
        """What is given, by size and time: no command may change it."""
        found = [path for path in self.given.rglob("*") if path.name not in (".moelab.lock",)]
        return sorted(
            (str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in found if not path.is_dir()
        )

    def good(self) -> list[list[str]]:
        """Command lines that are right, and answer at once."""
        config, configs, out, model = str(self.config), str(self.given / "configs"), str(self.out), "qwen3-30b-a3b"
        layer = ["--model", model, "--device", "NVIDIA H200"]
        explain, replay = (
            ["explain", *layer, "--batch-size", "4"],
            ["tune", "--replay", str(self.landscape), "--batch-size", "1"],
        )
        return [
            ["models"],
            ["shape", *layer],
            ["shape", "--model", str(self.model), "--tp-size", "2"],
            ["bench", "--model", model],
            [*explain, "--triton-version", "3.6.0"],
            [*explain, "--kernel", "fast"],
            ["doctor", configs],
            ["export", config, "--rules", "vllm", "--out", out],
            ["export", configs, "--rules", "sglang", "--out", out, "--overwrite"],
            ["record", "--list"],
            [*replay, "--out", out],
            [*replay, "--strategy", "random", "--budget", "1m"],
            ["tune", "--model", model, "--out", out],
            ["tune", "--resume", str(self.journal), "--out", out],
        ]


def cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A right command line, of which one to three values, options or words are spoiled."""
    ground = Ground(folder)
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    while True:
        argv, wrong = list(rng.choice(ground.good())), False
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            argv, bad = spoiled(rng, argv, commands[argv[0]].params if argv and argv[0] in commands else [], ground)
            wrong = wrong or bad
        yield case(ground, argv, wrong)


def spoiled(rng: random.Random, argv: list[str], params: Sequence[Any], ground: Ground) -> tuple[list[str], bool]:
    """The command line with one thing changed, and whether that must be refused."""
    how = rng.choice(("option", "option", "option", "option", "word", "drop", "twice", "unknown", "swap"))
    options = [param for param in params if param.param_type_name == "option" and not set(param.opts) & set(SKIPPED)]
    if how == "option" and options:
        param = rng.choice(options)
        name = rng.choice(param.opts)
        if getattr(param, "is_flag", False):
            return [*argv, name], False
        values = [value(rng, name, ground) for _ in range(max(1, param.nargs))]
        bad = name in WITHIN and not _within(values[0], *WITHIN[name])
        bad = (
            bad
            or (name == "--triton-version" and not re.fullmatch(r"[0-9]+(\.[0-9]+){2}\S*", values[0]))
            or "" in values
        )
        if len(values) == 1 and rng.random() < 0.3 and name.startswith("--"):
            return [*argv, f"{name}={values[0]}"], bad
        return [*argv, name, *values], bad
    if how == "word" and argv:
        place = rng.randrange(len(argv))
        return [*argv[:place], rng.choice(TEXTS), *argv[place + 1 :]], False
    if how == "drop" and argv:
        place = rng.randrange(len(argv))
        return argv[:place] + argv[place + 1 :], False
    if how == "twice" and argv:
        return [*argv, rng.choice(argv)], False
    if how == "swap" and len(argv) > 2:
        middle = argv[1:]
        rng.shuffle(middle)
        return [argv[0], *middle], False
    return [
        *argv,
        rng.choice(("--nope", "-z", "--out", "--model=", "--", "--json=1", "-hx", "---", "--batch-size")),
    ], False


def value(rng: random.Random, name: str, ground: Ground) -> str:
    """A value for an option: of its kind, of no kind, or a path."""
    pools: list[Sequence[str]] = [TEXTS, ground.paths()]
    if name in (*WITHIN, "--block-shape"):
        pools = [NUMBERS] * 4 + [TEXTS]
    elif name == "--budget":
        pools = [TIMES] * 4 + [TEXTS]
    elif name == "--triton-version":
        pools = [VERSIONS] * 4 + [TEXTS]
    elif name in (*WRITTEN, "--replay", "--resume", "--model", "--config-dir", "--complete"):
        pools = [TEXTS, ground.paths(), ground.paths()]
    found = rng.choice(rng.choice(pools))
    elsewhere = found.startswith(("/", "~", "..")) and not found.startswith(str(ground.out))
    return str(ground.out / "x") if name in WRITTEN and elsewhere else found


def _within(text: str, least: int, most: int | None) -> bool:
    try:
        number = int(float(text)) if text.isascii() and len(text) < 30 else int(text)
    except (ValueError, OverflowError):
        return False
    return number >= least and (most is None or number <= most)


UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def case(ground: Ground, argv: list[str], wrong: bool) -> Case:
    """Run in a folder of its own; what it prints is looked at for what a terminal would obey."""

    def run() -> str:
        with contextlib.chdir(ground.cwd), mock.patch.object(presets, "HUB_LIMIT_S", 0.05):
            try:
                return command(*argv)
            except Refused as error:
                assert not UNSAFE.search(str(error)), "what a terminal obeys"
                assert ground.listed() == ground.before, "what was given was changed"
                raise

    def right(said: str) -> bool:
        return not wrong and not UNSAFE.search(said) and ground.listed() == ground.before

    return Case(f"moelab {argv!r}"[:3000], run, right)
