"""What `make lab` tells Jupyter's server: notebooks are saved under 200 kB, figures as the numbers they are drawn from."""

import json

PLOTLY = "application/vnd.plotly.v1+json"
LIMIT = 195_000
"""Bytes of a saved notebook from which on its heaviest figures are left out, each with a line in its place."""


def saved_small(model, **_):
    """Drop the PNG that JupyterLab adds to every figure it has drawn (100 kB each; it is drawn anew anyway), then the heaviest
    figures until the file is under LIMIT. What the browser shows stays as it is."""
    if model["type"] != "notebook":
        return
    notebook = model["content"]
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    figures = [output["data"] for output in outputs if PLOTLY in output.get("data", {})]
    for data in figures:
        data.pop("image/png", None)
    for data in sorted(figures, key=lambda data: len(json.dumps(data)), reverse=True):
        if len(json.dumps(notebook, indent=1, ensure_ascii=False).encode()) < LIMIT:
            break
        title = data.pop(PLOTLY).get("layout", {}).get("title", {}).get("text", "A figure")
        data.clear()
        data["text/plain"] = f"{title}: not saved, since the file would be over 200 kB. Run the cell to draw it."


c.FileContentsManager.pre_save_hook = saved_small  # noqa: F821  # c is Jupyter's
