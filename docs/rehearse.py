"""The lesson of docs/teaching.md, headless and timed against its plan: make rehearse.

Runs the cells that a class runs, in their order, with an empty cache and without a network, as on a
student's laptop. A block's time is what its cells took, its words read at 150 a minute, and two
minutes per question that is asked. `--cached` uses the caches that are there, as on the evening
before. Ends with status 1 where a block leaves less than 30 % of its plan.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:
    resource = None

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
WORDS_PER_MINUTE, MINUTES_PER_QUESTION, SLACK = 150, 2, 0.3
# What a class leaves behind stays out of runs/, and nothing may be downloaded.
SETUP = "from pathlib import Path; from tsp_utils.study import profile as _p; _p.runs_dir = {}"
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"),
                           "http://127.0.0.1:9")


class Block(NamedTuple):
    """A block of the lesson: its minutes, the questions asked in it, and what is run: a notebook
    up to and with the cell `last`, from where the block before it stopped."""

    title: str
    minutes: int
    questions: int
    notebook: str = ""
    last: str = ""


LESSON = (
    Block("the idea", 10, 2, "00_overview", "00-04"),
    Block("neighbours", 13, 2, "02_neighbor_consistency", "02-07"),
    Block("hubs", 6, 1, "02_neighbor_consistency", "02-10"),
    Block("seeing them", 5, 1, "02_neighbor_consistency", "02-16"),
    Block("weights", 7, 1, "02_neighbor_consistency", "02-21"),
    Block("the loss", 7, 1, "03_head_training", "03-06"),
    Block("start and training", 15, 3, "03_head_training", "03-11"),
    Block("against K-means", 11, 2, "03_head_training", "03-22"),
    Block("collapse", 6, 1, "03_head_training", "03-25"),
    Block("fine-tuning", 20, 3, "06_ablation_finetuning", "06-09"),
    Block("wrap-up", 20, 6),
)


class Took(NamedTuple):
    """What a block took: seconds of its cells, and its words."""

    block: Block
    seconds: float
    words: int

    @property
    def minutes(self) -> float:
        return (self.seconds / 60 + self.words / WORDS_PER_MINUTE
                + MINUTES_PER_QUESTION * self.block.questions)

    @property
    def slack(self) -> float:
        return 1 - self.minutes / self.block.minutes


def cells_of_blocks(lesson, folder: Path) -> list[tuple[Block, list]]:
    """Each block with its cells; raises ValueError for a notebook or a cell that is not there."""
    found, begun = [], {}
    for block in lesson:
        cells = []
        if block.notebook:
            path = folder / f"{block.notebook}.ipynb"
            if not path.exists():
                raise ValueError(f"The lesson's block {block.title!r} reads {path.name}, which is "
                                 f"not there; name another notebook in docs/rehearse.py.")
            cells = nbformat.read(path, as_version=4).cells
            ids = [cell["id"] for cell in cells]
            start = begun.get(block.notebook, 0)
            if block.last not in ids[start:]:
                raise ValueError(f"The lesson's block {block.title!r} ends with cell "
                                 f"{block.last!r}, which {path.name} does not have after its cell "
                                 f"{start}; name another one in docs/rehearse.py.")
            begun[block.notebook] = ids.index(block.last) + 1
            cells = cells[start:begun[block.notebook]]
        found.append((block, cells))
    return found


def rehearse(lesson=LESSON, folder: Path = ROOT / "notebooks", cached: bool = False
             ) -> Iterator[Took]:
    """Yield what each block took; raises RuntimeError, in one sentence, where a cell fails."""
    blocks = cells_of_blocks(lesson, folder)
    with tempfile.TemporaryDirectory() as place:
        data = os.path.abspath(os.environ.get("TSP_DATA") or ROOT / "data")
        env = os.environ | NO_NETWORK | {"PYTHONPATH": str(ROOT), "TSP_DATA": data}
        if not cached:
            env["TSP_CACHE"] = place
        for notebook, group in itertools.groupby(blocks, lambda pair: pair[0].notebook):
            client = NotebookClient(nbformat.v4.new_notebook(), timeout=1200,
                                    kernel_name="python3", extra_arguments=["--log-level=40"])
            with client.setup_kernel(env=env, cwd=str(folder)) if notebook else nullcontext():
                if notebook:
                    setup = SETUP.format(f"lambda: Path({place!r})")
                    _run(client, nbformat.v4.new_code_cell(setup), None)
                for block, cells in group:
                    start = time.perf_counter()
                    for cell in cells:
                        if cell["cell_type"] == "code":
                            _run(client, cell, block)
                    yield Took(block, time.perf_counter() - start if cells else 0.0, sum(
                        len(cell["source"].split()) for cell in cells
                        if cell["cell_type"] == "markdown"))


def _run(client: NotebookClient, cell, block: Block | None) -> None:
    """Run a cell; RuntimeError names it and its block where it fails."""
    client.nb.cells = [cell]
    try:
        client.execute_cell(cell, 0)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        why = (f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else
               "it took 20 minutes" if isinstance(error, CellTimeoutError) else
               "its process died, most often for want of memory")
        where = f"{block.notebook}.ipynb, cell {cell['id']}" if block else "the set-up"
        raise RuntimeError(f"The lesson stopped in {where}: {why}") from None


def row(took: Took) -> str:
    block = took.block
    return (f"{block.title:<20s}{block.minutes:>5d}{took.seconds:>8.0f}{took.words:>7d}"
            f"{block.questions:>10d}{took.minutes:>9.1f}{100 * took.slack:>7.0f}"
            f"{'' if took.slack >= SLACK else '  too little'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cached", action="store_true", help="use the caches that are there")
    parser.add_argument("--csv", type=Path, help="keep the table there")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores; cache: {'as it is' if options.cached else 'empty'}; no network")
    print(f"{'block':<20s}{'plan':>5s}{'run, s':>8s}{'words':>7s}{'questions':>10s}{'minutes':>9s}"
          f"{'slack':>7s} %")
    all_of_it = []
    try:
        for took in rehearse(cached=options.cached):
            all_of_it.append(took)
            print(row(took), flush=True)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    whole = Took(Block("in all", sum(t.block.minutes for t in all_of_it),
                       sum(t.block.questions for t in all_of_it)),
                 sum(t.seconds for t in all_of_it), sum(t.words for t in all_of_it))
    print(row(whole))
    if resource:  # Windows has none
        unit = 1 if sys.platform == "darwin" else 1024
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
        print(f"most memory of one notebook: {most / 1e9:.1f} GB")
    if options.csv:
        lines = [f"{t.block.title},{t.block.minutes},{t.seconds:.0f},{t.words},{t.block.questions},"
                 f"{t.minutes:.1f},{100 * t.slack:.0f}\n" for t in (*all_of_it, whole)]
        head = "block,plan,run_s,words,questions,minutes,slack\n"
        options.csv.write_text("".join([head, *lines]), encoding="utf-8")
    sys.exit(min(t.slack for t in all_of_it) < SLACK)


if __name__ == "__main__":
    main()
