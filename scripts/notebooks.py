"""Execute notebooks from top to bottom, each in a kernel of this Python, and write them with their outputs elsewhere.

python scripts/notebooks.py                                   # all of notebooks/, into outputs/notebooks
python scripts/notebooks.py notebooks/1_what_is_a_decef_layer.ipynb --out FOLDER
"""

import argparse
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from cli import fail

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of IPython's tracebacks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", help="default: all of notebooks/")
    parser.add_argument("--out", type=Path, default=Path("outputs/notebooks"), help="folder for the executed notebooks")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take")
    arguments = parser.parse_args()

    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        started = time.perf_counter()
        try:
            notebook = nbformat.read(path, as_version=4)
            with TemporaryDirectory() as sockets:
                # Without folders of kernels the only one is ipykernel's own, of the Python that runs this.
                specs = KernelSpecManager(kernel_dirs=[])
                kernel = AsyncKernelManager(kernel_spec_manager=specs, transport="ipc", ip=f"{sockets}/kernel")
                where = {"metadata": {"path": str(path.resolve().parent)}}
                NotebookClient(notebook, km=kernel, timeout=arguments.timeout, resources=where).execute(cleanup_kc=True)
        except FileNotFoundError:
            fail(f"there is no notebook {path}")
        except (CellExecutionError, CellTimeoutError) as error:
            fail(f"{path} stops:\n{COLOURS.sub('', str(error))}")
        nbformat.write(notebook, arguments.out / path.name)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, written to {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
