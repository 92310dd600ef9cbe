"""TSP: deep clustering with features from self-supervised pretraining (Zhou & Zhang, 2022).

Every public name is importable from here, and loads its module only when it is asked for:
`import tsp_utils` alone loads neither torch nor numpy.
"""

import importlib

_HOME = {
    "datasets": ["DATASETS", "ImageDataset", "load_dataset"],
    "backbones": ["BACKBONES", "Backbone", "load_backbone"],
    "features": ["cached_features", "extract_features"],
    "scaling": ["Scaler", "scale_features"],
    "networks.patch_kmeans": ["PatchKMeans"],
    "networks.invariant_patches": ["InvariantPatches"],
    "pretraining.dictionary": ["learn_patch_kmeans"],
    "pretraining.invariant": ["learn_invariant_patches"],
    "neighbors": [
        "Neighbors", "nearest_neighbors", "neighbor_weights", "neighbor_perplexity",
        "label_consistency", "knn_accuracy",
    ],
    "approximate": ["find_neighbors"],
    "losses": ["tsp_loss"],
    "k_means": ["kmeans"],
    "heads": ["LinearHeads", "init_heads", "train_heads"],
    "estimator": ["TSPClustering"],
    "metrics": ["clustering_metrics", "confusion", "match_clusters"],
    "folder.how_many": ["suggest_n_clusters"],
    "study.claims": ["CLAIMS", "ICBPL_CLAIMS", "claim_of"],
    "study.verdicts": ["bootstrap_interval", "decide", "t_interval"],
    "study.ledger": ["Evidence", "read_evidence", "save_evidence"],
    "study.baselines": ["run_baseline"],
    "systems.rivals": ["RIVALS", "train_rival"],
    "systems.icbpl": ["ICBPLHeads", "mmd2", "simplex_centers"],
    "study.head_comparison": ["compare_heads"],
    "study.head_tables": ["heads_table"],
    "study.published": ["TABLE_1", "TABLE_2"],
    "study.feature_sets": ["FeatureSet"],
    "study.training": ["HeadRuns", "summarise"],
    "study.profile": ["Study", "load_study"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name):
    if name in _MODULE_OF:
        return getattr(importlib.import_module("tsp_utils." + _MODULE_OF[name]), name)
    if name == "__version__":  # pyproject.toml says it, as of the installation
        return importlib.import_module("importlib.metadata").version("tsp_utils")
    raise AttributeError(f"module 'tsp_utils' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
