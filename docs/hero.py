"""The README's picture and its animation, from real images: make hero.

Fashion-MNIST's first 2,000 test images under `patch_kmeans`, and one head of seed 0. Writes
hero.svg, hero.gif and hero.csv (loss and ACC by epoch, as drawn) into this folder.
"""

import base64
import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

import tsp_utils as tsp
from tsp_utils.maps import umap_points

FOLDER = Path(__file__).resolve().parent
COLORS = [tuple(int(255 * part) for part in color) for color in plt.get_cmap("tab10").colors]
N_IMAGES, N_DRAWN, QUERY = 2_000, 450, 36
STYLE = """<style>
text { font: 11px "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; fill: #24292f }
.card { fill: #ffffff; stroke: #d0d7de } .head { font-size: 13px; font-weight: bold }
.line { stroke: #d9480f; fill: none } .bar { fill: #d9480f } .soft { fill: #57606a }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 }
.card { fill: #0d1117; stroke: #30363d } .line { stroke: #ff922b } .bar { fill: #ff922b }
.soft { fill: #9da7b1 } }
</style>"""


def follow():
    """One head trained on the images' features: all that both pictures show, by name."""
    images = tsp.load_dataset("fashion-mnist", "test").subset(slice(0, N_IMAGES))
    raw = tsp.cached_features(tsp.load_backbone("patch_kmeans"), images, progress=False)
    features = tsp.Scaler().fit(raw).transform(raw)
    neighbors = tsp.nearest_neighbors(features, 20)
    heads = tsp.init_heads(features, len(images.classes), seeds=[0])
    probabilities = [heads.predict_proba(features)[0]]
    history = tsp.train_heads(
        heads, features, neighbors, progress=False,
        callback=lambda _, heads: probabilities.append(heads.predict_proba(features)[0]))
    probabilities = np.stack(probabilities[1:])  # [E, N, C]
    acc = [100 * tsp.clustering_metrics(images.labels, p.argmax(1))["acc"] for p in probabilities]
    curve = pd.DataFrame({"epoch": range(1, len(acc) + 1), "acc": acc,
                          "loss": history.curves["loss"][:, 0]})
    points = umap_points(features, N_IMAGES)[1]
    ranks = points.argsort(0).argsort(0) / N_IMAGES  # half of each axis, or islands leave it empty
    points = (points - points.min(0)) / np.ptp(points, 0) / 2 + ranks / 2
    return {"images": images, "neighbors": neighbors, "probabilities": probabilities,
            "weights": tsp.neighbor_weights(neighbors), "curve": curve,
            "points": points}  # [N, 2] in a unit square


def silhouette(pixels, color, size):
    """An image as its own stencil: the colour where it is bright, nothing where it is black."""
    alpha = Image.fromarray(pixels[..., 0]).resize((size, size), Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (size, size), (*color, 0))
    sprite.putalpha(alpha)
    return sprite


def scattered(images, places, colors, size, sprite):
    """Images as silhouettes in a square picture of `size` pixels; places [n, 2] in 0 to 1."""
    canvas = Image.new("RGBA", (size, size))
    for pixels, (x, y), color in zip(images, places, colors, strict=True):
        at = (round(x * (size - sprite)), round((1 - y) * (size - sprite)))
        canvas.alpha_composite(silhouette(pixels, color, sprite), at)
    return canvas


def apart(points, n_most, distance, first=()):
    """Up to n_most rows of points, none nearer to another than `distance`, beginning with first."""
    kept = list(first)
    for i, point in enumerate(points):
        if len(kept) < n_most and (np.abs(points[kept] - point).max(1) > distance).all():
            kept.append(i)
    return np.array(kept)


def embedded(picture, x, y, size):
    """An SVG element that holds the picture itself."""
    file = io.BytesIO()
    picture.quantize(64).save(file, "PNG", optimize=True)
    return (f'<image x="{x:.1f}" y="{y:.1f}" width="{size}" height="{size}" '
            f'href="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>')


def text(x, y, lines, kind=""):
    return "".join(f'<text class="{kind}" x="{x:.1f}" y="{y + 14 * i:.1f}">{line}</text>'
                   for i, line in enumerate(lines))


def hero_svg(found):
    """The pipeline in four panels, 700 x 360, as text: images, map, neighbours, clusters."""
    pixels, labels = found["images"].images, found["images"].labels
    final, near = found["probabilities"][-1], found["neighbors"].indices[QUERY]
    tile = [Image.fromarray(image[..., 0]) for image in pixels]
    heads = {14: "1  images", 150: "2  a frozen backbone’s map", 366: "3  neighbours",
             498: "4  clusters"}
    parts = [text(x, 24, [title], "head") for x, title in heads.items()]
    parts += [embedded(tile[i], 14 + 30 * (i % 4), 40 + 30 * (i // 4), 28) for i in range(32)]
    shown = apart(found["points"], N_DRAWN, 0.046, [QUERY, *near])
    size, place = 200, found["points"] * (1 - 32 / 480) + 16 / 480
    parts.append(embedded(scattered(pixels[shown], found["points"][shown],
                                    [(95, 115, 150)] * len(shown), 480, 32), 148, 44, size))
    x, y = (148 + size * place[:, 0], 44 + size * (1 - place[:, 1]))
    parts += [f'<path class="line" stroke-width="0.7" d="M{x[QUERY]:.1f} {y[QUERY]:.1f}'
              f'L{x[j]:.1f} {y[j]:.1f}"/>' for j in near]
    parts.append(f'<circle class="line" stroke-width="2" cx="{x[QUERY]:.1f}" cy="{y[QUERY]:.1f}" '
                 f'r="8"/>')
    parts += [embedded(tile[QUERY], 366, 40, 44), text(416, 58, ["an image,", "its nearest:"])]
    for row, j in enumerate(near[:7]):
        top, weight = 92 + 21 * row, 100 * found["weights"][QUERY, row]
        wrong = "" if labels[j] == labels[QUERY] else "  ✗"
        parts += [embedded(tile[j], 366, top, 19), text(
            402 + 6 * weight, top + 14, [f"{weight:.1f} %{wrong}"]),
            f'<rect class="bar" x="392" y="{top + 5}" width="{6 * weight:.1f}" height="9"/>']
    clusters, class_of = final.argmax(1), tsp.match_clusters(labels, final.argmax(1))
    for row, c in enumerate(np.argsort(class_of)):
        members = np.flatnonzero(clusters == c)
        best = members[np.argsort(-final[members, c])][:4]
        share = 100 * (labels[members] == class_of[c]).mean()
        color = "#{:02x}{:02x}{:02x}".format(*COLORS[c])
        parts.append(f'<rect x="498" y="{40 + 24 * row}" width="5" height="22" fill="{color}"/>')
        parts += [embedded(tile[i], 506 + 23 * at, 40 + 24 * row, 22) for at, i in enumerate(best)]
        name = found["images"].classes[class_of[c]]
        parts.append(text(602, 55 + 24 * row, [f"{share:.0f} % {name}"]))
    acc = found["curve"]["acc"].iloc[-1]
    parts += [text(14, 300, ["no label is read", "before the end"], "soft"),
              text(150, 300, ["never trained here: like images lie",
                              "together (UMAP; ring: image of 3)"], "soft"),
              text(366, 300, ["weights by closeness", "✗ another class"], "soft"),
              text(498, 300, ["one linear layer learns; beside:",
                              "share that is of the named class"], "soft"),
              text(14, 346, [f"{acc:.0f} % of {N_IMAGES:,} Fashion-MNIST images end in the cluster "
                             f"of their class. Labels only score: this count, ✗, the names."])]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 364" width="700" '
            f'height="364">{STYLE}<rect class="card" x="0.5" y="0.5" width="699" height="363" '
            f'rx="8"/>{"".join(parts)}</svg>\n')


def animation(found):
    """Yield frames, 700 x 380: images leave the map for their clusters, loss and ACC beside."""
    points, curve = found["points"], found["curve"]
    final = found["probabilities"][-1].argmax(1)
    n_clusters = found["probabilities"].shape[2]
    middles = np.stack([points[final == c].mean(0) for c in range(n_clusters)])
    order = np.argsort(np.arctan2(*(middles - points.mean(0)).T))  # neighbours stay neighbours
    angle = 2 * np.pi * order.argsort() / n_clusters
    places = 0.5 + 0.42 * np.stack([np.sin(angle), np.cos(angle)], 1)  # [C, 2], on a ring
    shown = apart(points, N_DRAWN, 0.02)
    pixels, labels = found["images"].images[shown], found["images"].labels
    class_of = tsp.match_clusters(labels, final)
    for at in np.unique(np.geomspace(1, len(curve), 45).round().astype(int)) - 1:
        p = found["probabilities"][at][shown]  # [n, C]
        nearest = p.argmax(1)
        sure = ((p.max(1) - 1 / n_clusters) / (1 - 1 / n_clusters))[:, None]
        target = places[nearest] + 0.3 * (points[shown] - middles[nearest])
        where = np.clip((1 - sure) * points[shown] + sure * target, 0, 1)
        figure = plt.figure(figsize=(7, 3.8), dpi=100, facecolor="white")
        ax = figure.add_axes((0.01, 0.01, 0.51, 0.9))
        ax.imshow(scattered(pixels, where, [COLORS[c] for c in nearest], 700, 30))
        ax.axis("off")
        figure.text(0.02, 0.94, f"epoch {at + 1}: an image moves to its cluster as far as the head "
                    f"is sure", fontsize=10)
        if at + 1 == len(curve):
            for c, (x, y) in enumerate(0.5 + 1.12 * (places - 0.5)):
                edge = [part / 255 for part in COLORS[c]]
                ax.text(700 * x, 700 * (1 - y), found["images"].classes[class_of[c]], fontsize=8,
                        ha="center", va="center", bbox={"fc": "white", "ec": edge, "pad": 2})
        titles = {"loss": "loss: no label in it", "acc": "ACC (%): labels, to score only"}
        for row, (name, title) in enumerate(titles.items()):
            ax = figure.add_axes((0.6, 0.55 - 0.45 * row, 0.37, 0.28))
            ax.plot(curve["epoch"], curve[name], alpha=0)  # the axes' limits, and no foresight
            ax.plot(curve["epoch"][: at + 1], curve[name][: at + 1], color="#d9480f")
            ax.plot(curve["epoch"][at], curve[name][at], "o", color="#d9480f")
            ax.set_title(f"{title}: {curve[name][at]:.1f}", fontsize=10, loc="left")
            ax.set(xscale="log", xticks=(1, 10, 100), xticklabels=("1", "10", "100"))
            ax.spines[["top", "right"]].set_visible(False)
        figure.canvas.draw()
        yield Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        plt.close(figure)


def main():
    found = follow()
    (FOLDER / "hero.svg").write_text(hero_svg(found), encoding="utf-8")
    found["curve"].round(4).to_csv(FOLDER / "hero.csv", index=False, lineterminator="\n")
    frames = list(animation(found))
    palette = frames[-1].quantize(64)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE)
                      for frame in frames]
    first.save(FOLDER / "hero.gif", save_all=True, append_images=others, loop=0, optimize=True,
               duration=[250] * (len(frames) - 1) + [4000])


if __name__ == "__main__":
    main()
