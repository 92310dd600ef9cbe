"""What an edit makes old: the table in docs/architecture.md, worked out from what is reached."""

from readings import PATHS, ROOT, code_of

from experiments import (
    collapse,
    dictionary_arms,
    finetuning,
    finetuning_map,
    heads,
    how_many,
    invariant_arms,
    photos,
    quality,
    stability,
)
from tsp_utils.backbones import load_backbone
from tsp_utils.cache import keys
from tsp_utils.features import _feature_batches, code_that_sees
from tsp_utils.k_means import kmeans
from tsp_utils.scaling import Scaler
from tsp_utils.study.profile import load_study
from tsp_utils.study.staleness import _code_called
from tsp_utils.study.training import code_of_training

EDITS = {
    "a docstring, a comment, a type hint": None,
    "a plot's colour (`plots`), the page (`page`)": "plot_ledger",
    "`losses.tsp_loss`": "tsp_loss",
    "`Backbone.prepare`": "Backbone.prepare",
    "`PatchKMeans.forward`": "PatchKMeans.forward",
    "`neighbors.neighbor_weights` (Eq. 4)": "neighbor_weights",
    "`k_means.kmeans`": "kmeans",
    "`baselines._clusters`": "_clusters",
    "`other_losses.cc`, a rival's loss": "cc",
    "`metrics.clustering_metrics`": "clustering_metrics",
    "`verdicts.decide`": "decide",
    "`cluster_folder.write_results`": "write_results",
}


def names_in(reached: dict) -> set[str]:
    return {text.split(":")[0].split(" = ")[0] for text in reached.values()}


def test_the_table_of_edits_is_what_is_reached(monkeypatch):
    """By each kind of result, and by each notebook."""
    network = load_backbone("patch_kmeans", device="cpu")
    functions = {"features": [_feature_batches, *code_that_sees(network, None)],
                 "K-means": [kmeans, Scaler.fit, Scaler.transform],
                 "heads": code_of_training(load_study())}
    kinds = {kind: names_in(keys._reached(given, set())) for kind, given in functions.items()}
    monkeypatch.setattr(keys, "_digest", names_in)
    notebooks = {path.stem[:2]: _code_called(code_of(path)) for path in PATHS}
    lines = []
    for edit, name in EDITS.items():
        old = ["yes" if name in names else "" for names in kinds.values()]
        rerun = [number for number, names in notebooks.items() if name in names]
        lines.append(f"| {edit} | {' | '.join(old)} | {', '.join(rerun) or 'none'} |")
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page, "\n" + "\n".join(lines)
    assert {"03", "04", "05"} <= {n for n, names in notebooks.items() if "tsp_loss" in names}
    everything = set().union(*kinds.values(), *notebooks.values())
    assert not everything & {"plot_ledger", "folder_page", "set_style"}  # what draws


def test_no_record_hangs_on_how_files_are_read(monkeypatch):
    """Some cost hours or a GPU: a sentence about a folder must not make them old."""
    reached = []
    monkeypatch.setattr(keys, "_digest", lambda found: reached.append(names_in(found)) or "")
    for code in (collapse.code_of_the_sweep, dictionary_arms.code_of_the_arms,
                 finetuning.code_of_the_runs, finetuning_map.code_of_the_map,
                 heads.code_of_the_comparison, invariant_arms.code_of_the_invariant_arms,
                 photos.code_of_a_kind, stability.code_of_a_cell,
                 lambda: keys.code_of(how_many.picks),
                 lambda: quality.code_of_a_rung(load_study())):
        code()
    assert all(reached) and not set().union(*reached) & {"load_dataset", "kinds_of"}
