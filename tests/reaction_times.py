"""How soon 05_config_search answers a drag of its sliders: `python tests/reaction_times.py [CHECKOUT ...]`.

For each checkout (this one if none is named) a JupyterLab of its own runs the whole notebook in chromium; then BLOCK M of the
landscape's browser and Budget of the race are dragged by the mouse, five times in one checkout, five in the next, and so on
until each was dragged MOVES times. Printed, median and worst: "answer", from the first movement of the pointer to the first
change painted in the cell outside the slider itself; "settled", from the last movement to the last change painted, all titles
having changed and nothing more having happened for a second; "page" and "kernel", the seconds of a processor that the page's
main thread and the kernel took from the one end to the other, which a busy machine moves least. It asserts nothing: what else
runs on the machine moves it, so the load is printed too. An older checkout needs only its files: `git worktree add --detach
FOLDER COMMIT`.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from browser import ROOT, Tab, copy_of_the_checkout, find_chromium, page, shared_lab, started

NOTEBOOK = "notebooks/05_config_search.ipynb"
MOVES, TURN = 20, 5
TIMES = ("answer", "settled", "page", "kernel")
SLIDERS = {"BLOCK M": 2, "Budget": 8}  # by how many of its values each is dragged
WATCH = """slider => {
    const cell = slider.closest('.jp-Cell'), inputs = [], paints = [];
    const titles = () => [...cell.querySelectorAll('.js-plotly-plot .gtitle')].map(node => node.textContent);
    const before = titles();
    let due = 0;
    const painted = () => { due -= 1; paints.push(performance.now()); };
    const counts = change => !slider.contains(change.target)
        && (change.type !== 'attributes' || change.target.closest?.('.main-svg'));
    const observer = new MutationObserver(changes => {
        if (changes.some(counts)) { due += 1; requestAnimationFrame(() => setTimeout(painted)); }
    });
    observer.observe(cell, { childList: true, subtree: true, characterData: true, attributes: true });
    const moved = event => { if (event.buttons) inputs.push(event.timeStamp); };
    addEventListener('pointermove', moved, true);
    window.moelabWatched = () => {
        const now = titles(), kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
        const settled = paints.length && !due && performance.now() - paints.at(-1) > 1000 && kernel.status === 'idle'
            && now.length === before.length && now.every((title, i) => title !== before[i]);
        if (!settled) return null;
        observer.disconnect();
        removeEventListener('pointermove', moved, true);
        return [paints[0] - inputs[0], paints.at(-1) - inputs.at(-1)];
    };
}"""


@dataclass
class Watched:
    """A tab with the notebook run, and what was measured in it: slider -> TIMES of each move, in seconds."""

    name: str
    tab: Tab
    kernel: int
    times: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: {name: [] for name in SLIDERS})

    def __post_init__(self) -> None:
        self._protocol = self.tab.page.context.new_cdp_session(self.tab.page)
        self._protocol.send("Performance.enable", {"timeDomain": "threadTicks"})

    def _busy_s(self) -> tuple[float, float]:
        metrics = self._protocol.send("Performance.getMetrics")["metrics"]
        page = next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")
        user, system = Path(f"/proc/{self.kernel}/stat").read_text().rpartition(")")[2].split()[11:13]
        return page, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def drag(self, name: str) -> tuple[float, ...]:
        """Drag a slider's first handle there, or back where it is beyond the middle."""
        page, control = self.tab.page, self.tab.control(name)
        handle = control.locator(".noUi-handle").first
        handle.scroll_into_view_if_needed()
        at, last = (round(float(handle.get_attribute(f"aria-value{which}") or 0)) for which in ("now", "max"))
        base, grip = control.locator(".noUi-base").bounding_box(), handle.bounding_box()
        assert base is not None and grip is not None
        x, y = grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2
        steps = SLIDERS[name] * (1 if at + SLIDERS[name] < last else -1)
        busy_s = self._busy_s()
        page.mouse.move(x, y)
        page.mouse.down()
        page.evaluate(WATCH, control.element_handle())
        page.mouse.move(x + steps * base["width"] / _whole(control, last), y, steps=10)
        page.mouse.up()
        answer, settled = page.wait_for_function("window.moelabWatched()", polling=100).json_value()
        took = [after - before for before, after in zip(busy_s, self._busy_s(), strict=True)]
        return answer / 1e3, settled / 1e3, *took

    def report(self) -> None:
        for slider, times in self.times.items():
            columns = zip(TIMES, zip(*times, strict=True), strict=True)
            said = "  ".join(f"{what} {statistics.median(s):5.2f} s, worst {max(s):5.2f}" for what, s in columns)
            print(f"{self.name:<24} {slider:<8} {len(times)} drags  {said}")


def _whole(control, last: int) -> float:  # type: ignore[no-untyped-def]  # a Locator
    """How many steps the whole slider has; of a range the first handle goes up to the second only."""
    ends = [float(h.get_attribute("aria-valuemax") or 0) for h in control.locator(".noUi-handle").all()]
    return max(last, *ends) if len(ends) > 1 else last


def _kernel_below(folder: Path) -> int:
    """The process of the kernel that works in that folder (Linux)."""
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"ipykernel_launcher" in (each / "cmdline").read_bytes() and (each / "cwd").resolve().is_relative_to(
                folder
            ):
                return int(each.name)
    raise SystemExit(f"no kernel works in {folder}")


def main(checkouts: list[Path]) -> None:
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no chromium on PATH; on Debian: apt-get install chromium fonts-dejavu-core")
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        browser, watched = stack.enter_context(started(chromium)), list[Watched]()
        for i, checkout in enumerate(checkouts):
            os.environ["PYTHONPATH"] = str(checkout)  # of the server to come, and so of its kernels
            server = stack.enter_context(shared_lab(scratch / str(i)))
            tab = stack.enter_context(page(browser, server))
            tab.folder = copy_of_the_checkout(Path(server.root) / "copy", checkout)
            tab.open(NOTEBOOK)
            tab.run_all()
            watched.append(Watched(checkout.name, tab, _kernel_below(tab.folder)))
        for each in watched:  # the first drag finds what no later one does
            each.tab.page.bring_to_front()
            for name in SLIDERS:
                each.drag(name)
        print("load", *(f"{load:.1f}" for load in os.getloadavg()))
        for _ in range(0, MOVES, TURN):
            for each in watched:
                each.tab.page.bring_to_front()
                for name in SLIDERS:
                    each.times[name] += [each.drag(name) for _ in range(TURN)]
        for each in watched:
            each.report()
        print("load", *(f"{load:.1f}" for load in os.getloadavg()))


if __name__ == "__main__":
    main([Path(given).resolve() for given in sys.argv[1:]] or [ROOT])
