"""The experiments by name: python -m experiments NAME. Each makes again something that ships."""

import argparse
import importlib
import logging
import sys

# Name: its file, its function, what the help says.
EXPERIMENTS = {
    "pretrain": ("arms", "pretrain_arm", "pretrain one arm of the source ablation by DINO"),
    "bundle": ("what_ships", "bundle_backbone", "put a finished arm into bundled/, with its card"),
    "learn-patches": ("what_ships", "learn_patches", "learn patch_kmeans again from its source"),
    "vectors": ("what_ships", "extract_bundled_vectors", "extract the bundled vectors again"),
    "paper-vectors": ("what_ships", "export_paper_vectors",
                      "vectors of the paper's central row, as a file to send or to take in"),
    "learn-invariant": ("what_ships", "learn_invariant",
                        "learn invariant_patches again from its source (20 minutes of a core)"),
    "dictionary-arms": ("dictionary_arms", "learn_dictionary_arms",
                        "learn and read out the dictionaries of claim C6 (36 minutes)"),
    "invariant-arms": ("invariant_arms", "learn_invariant_arms",
                       "learn and read out the backbones of claim C6 (two hours of two cores)"),
    "finetune": ("finetuning", "run_finetuning", "the fine-tuning of claim C7 (an hour)"),
    "collapse": ("collapse", "run_collapse",
                 "fine-tuning for sixteen epochs on a better network (a GPU)"),
    "finetune-map": ("finetuning_map", "run_finetuning_map",
                     "the fine-tuning map of claim D1 (an hour and a quarter)"),
    "extract": ("extract", "extract", "features into the cache, by all processes of torchrun"),
    "parity": ("official_parity", "official_features",
               "features of the paper's networks by the official code, from seeded weights"),
    "heads": ("heads", "run_heads_compared", "every head, ten seeds (an hour)"),
    "learn-labelled": ("labelled", "learn_from_labels",
                       "train a small network on Tiny-ImageNet's labels, for notebook 11's rungs"),
    "quality": ("quality", "climb", "what a head adds on every rung of feature quality"),
    "budget": ("budget", "read_budget",
               "at which learning rate the loss rests, on every rung (51 minutes, busy)"),
    "stability": ("stability", "read_stability", "do two fits agree (half an hour)?"),
    "photos": ("photos", "read_kinds",
               "backbones by kind of image (docs/your_own_images_measured.md)"),
    "how-many": ("how_many", "ask", "how many clusters, by criteria without labels (17 minutes)"),
    "official-rivals": ("official_rivals", "official_rivals",
                        "SCAN's and TEMI's published training code beside ours"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.split("\n")[0])
    names = top.add_subparsers(dest="experiment", required=True, metavar="NAME")
    makers = {name: names.add_parser(name, help=words) for name, (*_, words) in EXPERIMENTS.items()}
    for name in ("pretrain", "bundle"):
        makers[name].add_argument("name", metavar="arm", help="of experiments.arms.ARMS")
    makers["pretrain"].add_argument("--out", default=None, dest="out_dir",
                                    help="folder; default: runs/pretrain/ARM")
    for name in ("learn-patches", "learn-invariant"):
        makers[name].add_argument("--out", default=None,
                                  help="file to write; default: the bundled one")
        makers[name].add_argument("--seed", type=int, default=0)
    for name in ("dataset", "split", "backbone"):
        makers["extract"].add_argument(name)
    makers["paper-vectors"].add_argument("--train", action="store_true",
                                         help="those of the 50,000 training images as well")
    makers["parity"].add_argument("dino", help="folder of a clone of facebookresearch/dino")
    makers["photos"].add_argument("folder", help="into which two Debian packages were unpacked")
    makers["official-rivals"].add_argument("folder", help="folder of two clones, scan and temi")
    return top


def main(arguments) -> None:
    """Run one experiment with its own arguments, and print what it wrote."""
    own = vars(parser().parse_args(arguments))
    file, function, _ = EXPERIMENTS[own.pop("experiment")]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("experiments").setLevel(logging.INFO)
    made = getattr(importlib.import_module(f"experiments.{file}"), function)(**own)
    for path in made if isinstance(made, list) else [made]:
        print(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
