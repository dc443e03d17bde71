import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path, out, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "notebooks.py"), str(path), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )


def notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_from_top_to_bottom(path, tmp_path):
    done = execute(path, tmp_path, DECEF_DATA=str(tmp_path / "nothing"))
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in nbformat.read(tmp_path / path.name, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source
        assert cell.metadata == {}


def test_the_kernel_is_this_python_whatever_kernels_there_are(tmp_path):
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/bin/false", "{connection_file}"], "display_name": "another", "language": "python"}')
    path = notebook(tmp_path / "which.ipynb", f"import sys\nassert sys.executable == {sys.executable!r}")
    done = execute(path, tmp_path / "out", JUPYTER_PATH=str(tmp_path / "jupyter"))
    assert done.returncode == 0, done.stderr


def test_a_failing_cell_is_shown(tmp_path):
    path = notebook(tmp_path / "broken.ipynb", "x = 1", "x / 0")
    done = execute(path, tmp_path / "out")
    assert done.returncode == 2
    assert "broken.ipynb stops" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    assert not (tmp_path / "out" / "broken.ipynb").exists()
    assert "there is no notebook" in execute(tmp_path / "none.ipynb", tmp_path / "out").stderr
