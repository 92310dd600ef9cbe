"""The command: tsp-utils COMMAND, or python -m tsp_utils COMMAND.

The only module of the package that prints.
"""

import argparse
import math
import re
import shutil
import sys
import time


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tsp_utils", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, do, words: str, *parents) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=words, parents=parents)
        added.set_defaults(do=do)
        return added

    settings, images = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    settings.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides",
                          help="override settings of the profile; the run gets a folder of its own")
    images.add_argument("folder", help="images, nested or flat, of any size; it is not changed")
    images.add_argument("--backbone", default="auto",
                        help="default auto: by the images' size, of what can be had; or a name")
    images.add_argument("--out", help="default: clusters/NAME OF THE FOLDER")
    images.add_argument("--seed", type=int, default=0, help="another one starts anew")
    images.add_argument("--force", action="store_true", help="replace results that are there")

    run = command("reproduce", run_notebooks, "run every notebook of a profile", settings)
    run.add_argument("--profile", default="offline", help="offline (default), small or paper")
    run.add_argument("--force", action="store_true", help="run again what did not change")
    run.add_argument("--jobs", type=int, metavar="N",
                     help="notebooks side by side: by default 2, with a GPU 1")
    row = command("paper-mini", central_row, "the paper's central row, stage by stage", settings)
    row.add_argument("--go-on", action="store_true", help="past a stage that departs")
    cluster = command("cluster", cluster_images, "cluster a folder of images", images)
    cluster.add_argument("--n-clusters", type=int, required=True, help="yours to choose; required")
    cluster.add_argument("--n-neighbors", type=int, default=20, help="K of Eq. 4, default 20")
    cluster.add_argument("--entropy-weight", type=float, default=3.0,
                         help="default 3; lower it where clusters should differ in size")
    kept = command("cache", keep_cache, "say how large the cache is, or make it smaller")
    kept.add_argument("--prune", type=size, default=math.inf, metavar="SIZE",
                      help="such as 500M or 2G: what was not used for longest goes first")
    suggest = command("suggest", suggest_number, "how many clusters a folder may have", images)
    suggest.add_argument("--min-clusters", type=int, default=2, help="default 2")
    suggest.add_argument("--max-clusters", type=int, help="default 30")
    vectors = command("bundle-vectors", take_in, "take in a file of make paper-vectors")
    vectors.add_argument("file", help="features, labels and their card; it is checked, and copied")
    copy = command("figures", copy_figures, "copy a finished run's figures into figures/")
    copy.add_argument("--profile", default="offline")
    command("refresh", refresh_notebooks, "put a finished run's outputs into notebooks/")
    return top


def size(text: str) -> int:
    """Bytes of a size such as 0, 800K, 500M or 2.5G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.upper())
    if not found:
        raise ValueError
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def main(arguments) -> int:
    args = parser().parse_args(arguments)
    from tsp_utils.files.paths import IS_CLONE
    if not IS_CLONE and args.command not in ("cluster", "suggest", "cache", "bundle-vectors"):
        raise OSError(f"{args.command} works on the notebooks and records of a clone, and this is "
                      f"an installed package; clone the repository and run it there.")

    import logging
    import warnings
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", module="zmq|traitlets|PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    return args.do(args) or 0


def run_notebooks(args) -> int:
    from tsp_utils.study.profile import load_study
    from tsp_utils.study.runner import reproduce, stop_when_terminated
    stop_when_terminated()
    profile = " ".join([args.profile, *args.overrides])
    report(reproduce(profile, args.force, jobs=args.jobs))
    print(f"executed notebooks and figures: runs/{load_study(profile).profile}")
    return report_against_paper(profile) if args.profile == "paper" else 0


def central_row(args) -> int:
    """A paragraph a stage; 3 where one departs from the paper."""
    from tsp_utils.study.paper_mini import paper_mini
    from tsp_utils.study.profile import load_study
    departs = False
    for gate in paper_mini(" ".join(args.overrides), args.go_on):
        departs |= gate.passed is False
        verdict = {True: "pass", False: "DEPARTS", None: "for the record"}[gate.passed]
        print(f"{gate.stage}: {verdict} ({gate.seconds:.0f} s)\n  expected  {gate.expected}\n"
              f"  came      {gate.came}\n  means     {gate.means}", flush=True)
    folder = load_study(" ".join(["paper-mini", *args.overrides])).profile
    print(f"runs/{folder}/paper_mini.json has every stage, docs/paper_mini.md what each means"
          f"{'; GO_ON=1 (--go-on) goes past a departure' * departs}")
    return 3 if departs else 0


def cluster_images(args) -> None:
    from tsp_utils.folder.cluster_folder import cluster_folder
    try:
        out = cluster_folder(args.folder, args.n_clusters, backbone=args.backbone, out=args.out,
                             force=args.force, seed=args.seed, n_neighbors=args.n_neighbors,
                             entropy_weight=args.entropy_weight)
    except ValueError as error:  # by the names of the options, as they were typed
        raise ValueError(re.sub(r"(?<![\w-])n_clusters|n_neighbors|entropy_weight", lambda name: (
            "--" + name[0].replace("_", "-")), str(error))) from error
    print(f"{out / 'clusters.csv'}\n{out / 'report.html'}")


def keep_cache(args) -> None:
    from tsp_utils.cache import prune
    from tsp_utils.files.paths import cache_dir
    removed, left = prune(args.prune)
    print(f"{cache_dir()}: {removed / 1e6:,.1f} MB removed, {left / 1e6:,.1f} MB kept")


def suggest_number(args) -> None:
    from tsp_utils.folder.how_many import WORTH, suggest_folder
    out, found = suggest_folder(args.folder, args.min_clusters, args.max_clusters, seed=args.seed,
                                backbone=args.backbone, out=args.out, force=args.force)
    for name, words in WORTH.items():
        print(f"{words}: {found.picks[name]}")
    print(f"Three alike and above 2 are worth something; 2 is the usual answer, right or wrong "
          f"(docs/how_many_clusters.md).\n{out / 'how_many.csv'}\n{out / 'how_many.png'}")


def take_in(args) -> None:
    from tsp_utils.study.feature_sets import take_in_vectors
    path, card = take_in_vectors(args.file)
    print(f"{path}\n{card['dataset']} {card['split']} under {card['backbone']}, SHA-256 of the "
          f"weights {card['weights_sha256'][:16]}; offline's lessons on head, K and start use the "
          f"test images' from now on, until the file is deleted")


def refresh_notebooks(args) -> None:
    from tsp_utils.study.publish import refresh
    print(f"wrote the outputs of {len(refresh())} notebooks")


def copy_figures(args) -> None:
    from tsp_utils.study.publish import publish_figures
    print(f"copied {len(publish_figures(args.profile))} files into figures/{args.profile}")


def report_against_paper(profile: str) -> int:
    """Print ours against the paper's ACC; 3 where a head's lies beyond one point, else 0."""
    from tsp_utils.study.against_paper import compare
    from tsp_utils.study.profile import load_study
    table = compare(load_study(profile))
    print("\nACC, ours less the paper's, with the 95 % Welch interval:")
    print(table.round(2).to_string(index=False) if len(table) else "no pair has a row there")
    outside = table[table["outside"] & (table["stage"] == "head")]
    print(f"{len(outside)} of {(table['stage'] == 'head').sum()} heads lie beyond one point")
    return 3 if len(outside) else 0


def report(steps) -> None:
    """Print a line where a notebook starts and where it ends, and between them how far it is.

    On a terminal the last is one line, written again and again; elsewhere a line of each notebook
    ten seconds later where it has come further, a minute later where it has not.
    """
    from tsp_utils.study.runner import Step
    start, terminal = time.perf_counter(), sys.stdout.isatty()
    clear = "\r\x1b[K" if terminal else ""
    running, said = {}, {}  # by name: its last step; when something was said of it, and what
    try:
        for step in (Step(*step) for step in steps):
            running.pop(step.name, None)
            if not step.ended:
                running[step.name] = step
            now, (at, what) = time.perf_counter(), said.get(step.name, (-math.inf, ""))
            late = not terminal and now >= at + (60 if step.what == what else 10)
            if step.ended or step.name not in said or late:
                seconds = f" {step.seconds:6.0f} s" if step.ended or step.seconds else ""
                print(f"{clear}{step.name:28s} {step.what:20s}{seconds}".rstrip(), flush=True)
                said[step.name] = now, step.what
            if terminal:
                far = " | ".join(f"{step.name}: {step.what}, {step.seconds:.0f} s"
                                 for step in running.values())
                print(clear + far[:shutil.get_terminal_size().columns - 1], end="", flush=True)
    finally:
        print(clear, end="", flush=True)
    print(f"{'all':28s} {'':20s} {time.perf_counter() - start:6.0f} s")


def console() -> None:
    """The command `tsp-utils`, and python -m tsp_utils: one sentence where it cannot."""
    if hasattr(sys.stdout, "reconfigure"):  # names that a terminal of ASCII lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main(sys.argv[1:]))
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; make setup installs what is needed into .venv.")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: what was finished is kept; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    console()
