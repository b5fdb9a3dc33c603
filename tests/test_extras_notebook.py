"""The notebook of examples/ runs from its first cell to its last in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "spreadsheet_to_model.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return folder, notebook


def output(notebook: Any, beginning: str) -> str:
    """What the first cell printed that contains a text."""
    cell = next(cell for cell in notebook.cells if beginning in cell.source)
    return "".join(part.get("text", "") for part in cell.get("outputs", ()))


def test_it_ends_with_an_aligned_model_that_answers(executed: Any) -> None:
    folder, notebook = executed
    assert (folder / "runs/aligned/export/model.safetensors").is_file()
    assert output(notebook, "AutoModelForCausalLM").strip()


def test_it_draws_a_chart(executed: Any) -> None:
    kinds = {kind for cell in executed[1].cells for part in cell.get("outputs", ()) for kind in part.get("data", {})}
    assert "image/png" in kinds


def test_alignment_raises_the_reward(executed: Any) -> None:
    import csv

    with (executed[0] / "runs/aligned/metrics.csv").open(encoding="utf-8") as stream:
        rewards = [float(row["eval/reward"]) for row in csv.DictReader(stream) if row["eval/reward"]]
    assert rewards[-1] > rewards[0]


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    assert not re.search(r"/(?:home|root|Users)/", NOTEBOOK.read_text(encoding="utf-8"))
