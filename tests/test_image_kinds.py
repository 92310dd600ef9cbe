"""Kinds of image files: transparent, of many bits, of many pages, badly tagged, oddly named."""

import io
import os
import struct
from collections import Counter

import numpy as np
import pytest
from PIL import ExifTags, Image

from tsp_utils import load_dataset
from tsp_utils.files.image_folders import find_images, kinds_of, labels_from_folders
from tsp_utils.folder.readable_files import ReadableFiles

pytestmark = pytest.mark.filterwarnings("ignore:.*(Tag data|Metadata Warning|Corrupt EXIF)")

SEEN = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
GREY = SEEN[..., 0]
ALPHA = np.uint8([0, 255])[np.add.outer(np.arange(40), np.arange(30)) % 3 // 2]  # stripes


def decoded(path) -> np.ndarray:
    """The one image of a folder of its own, as a network is given it: [H,W,1 or 3]."""
    assert os.listdir(path.parent) == [path.name]
    return load_dataset(path.parent).images[0]


def in_a_folder(folder, name, image, **options):
    folder.mkdir(parents=True)
    image.save(folder / name, **({"lossless": True} if name == "a.webp" else {}) | options)
    return decoded(folder / name)


def transparent(kind: str, hidden: int):
    """An image whose ALPHA is 0 where a hidden colour lies, and what to pass to `save`."""
    color, grey = (np.where(clear, hidden, image.clip(50)).astype(np.uint8)  # hidden nowhere else
                   for image, clear in ((SEEN, ALPHA[..., None] == 0), (GREY, ALPHA == 0)))
    if kind == "P":
        image = Image.fromarray(np.where(ALPHA > 0, grey, 3).astype(np.uint8)).convert("P")
        palette = np.repeat(np.arange(256), 3)
        palette[9:12] = hidden  # number 3
        image.putpalette(palette.astype(np.uint8).tobytes())
        return image, {"transparency": 3}
    pixels, transparency = {
        "RGBA": (np.dstack([color, ALPHA]), None), "LA": (np.dstack([grey, ALPHA]), None),
        "RGB": (color, (hidden,) * 3), "L": (grey, hidden),
        "I;16": (grey.astype(np.uint16) << 8, hidden << 8)}[kind]
    return Image.fromarray(pixels), {} if transparency is None else {"transparency": transparency}


@pytest.mark.parametrize("name, kind", [
    ("a.png", "RGBA"), ("a.tif", "RGBA"), ("a.webp", "RGBA"), ("a.png", "LA"), ("a.tif", "LA"),
    ("a.png", "P"), ("a.gif", "P"), ("a.png", "RGB"), ("a.png", "L"), ("a.png", "I;16")])
def test_what_is_invisible_never_decides(tmp_path, name, kind):
    found = []
    for hidden in (0, 40):
        image, options = transparent(kind, hidden)
        options |= {"exact": True} if name == "a.webp" else {}
        found.append(in_a_folder(tmp_path / str(hidden), name, image, **options))
    assert np.array_equal(*found) and (found[0][ALPHA == 0] == 128).all()
    wanted = SEEN.clip(50) if kind in ("RGBA", "RGB") else GREY.clip(50)[..., None]
    assert found[0].shape[2] == (3 if kind in ("RGBA", "RGB", "P") else 1)
    assert (found[0][ALPHA > 0] == wanted[ALPHA > 0]).all()


def test_grey_that_was_multiplied_by_its_alpha_is_read(tmp_path):
    image, _ = transparent("LA", 0)
    image.convert("LA").save(tmp_path / "plain.tif")
    content = (tmp_path / "plain.tif").read_bytes()
    tag = struct.pack("<HHIHH", 338, 3, 1, 2, 0)  # ExtraSamples: alpha of its own
    assert content.count(tag) == 1
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tif").write_bytes(content.replace(tag, tag[:8] + b"\x01\0\0\0"))
    found = decoded(tmp_path / "set" / "a.tif")
    assert (found[ALPHA == 0] == 128).all()
    assert np.array_equal(found[ALPHA > 0][:, 0], GREY.clip(50)[ALPHA > 0])


def test_a_folder_that_goes_on_takes_slices_and_counts_what_it_was_asked_for(tmp_path):
    for i in range(3):
        Image.fromarray(SEEN).save(tmp_path / f"{i}.png")
    files = ReadableFiles(tmp_path, ["0.png", "1.png", "2.png"])
    assert len(files[:2]) == 2 and files.seen == set()
    assert len(list(files)) == 3 and files.seen == {0, 1, 2}


FULL = GREY.copy()
FULL[0, :2] = 0, 255
FRACTIONS = FULL / np.float32(255)


@pytest.mark.parametrize("name, stored, wanted", [
    ("a.tif", FRACTIONS, FULL),  # [0, 1]
    ("a.tif", FRACTIONS * 1.2 - 0.1, FULL * 1.2 - 25.5),  # as resampling passes them
    ("a.tif", FRACTIONS * 2 - 1, FULL),  # [-1, 1]
    ("a.tif", FRACTIONS * 1e-9, FULL * (1e-9 * 16**7.)),
    ("a.tif", FRACTIONS + 300, FULL),  # few greys of 4,096 would be left
    ("a.tif", FULL.astype(np.float32), FULL),
    ("a.tif", np.where(FULL == 255, np.nan, FRACTIONS), np.where(FULL == 255, 128, FULL)),
    ("a.tif", np.where(FULL == 255, np.inf, FRACTIONS), FULL),
    ("a.tif", FULL.astype(np.int32), FULL),
    ("a.tif", (FULL > 99).astype(np.int32), 255 * (FULL > 99)),
    ("a.tif", FULL.astype(np.int32) * 4096, FULL),  # 20 bits
    ("a.tif", FULL.astype(np.int32) * 16 - 2048, FULL / 2 + 64),  # 12 bits with a sign
    ("a.tif", FULL.astype(np.int32) + 10**9, FULL),
    ("a.tif", FULL.astype(np.uint16) * 16, FULL),  # 12 bits
    ("a.png", FULL.astype(np.uint16) * 16 + 15, FULL),
    ("a.pgm", FULL.astype(np.uint16) * 16, FULL),
    ("a.png", FULL.astype(np.uint16) * 64, FULL / 4),  # 14 bits, as ever
    ("a.png", FULL.astype(np.uint16) * 257, FULL),
    ("a.tif", np.full((40, 30), 40_000, np.uint16), np.full((40, 30), 156)),  # blank is blank
    ("a.tif", np.zeros((40, 30), np.float32), np.zeros((40, 30))),
    ("a.tif", np.full((40, 30), np.nan, np.float32), np.full((40, 30), 128))])
def test_many_bits_and_fractions_are_scaled_by_one_rule(tmp_path, name, stored, wanted):
    stored = stored.astype(np.float32) if stored.dtype == np.float64 else stored
    found = in_a_folder(tmp_path / "set", name, Image.fromarray(stored))
    assert found.shape == (40, 30, 1)
    assert np.abs(found[..., 0] - np.clip(wanted, 0, 255)).max() <= 1.01  # cut, not rounded


@pytest.mark.parametrize("name, blank", [("a.tif", 255), ("a.gif", 0), ("a.webp", 0)])
def test_the_first_page_that_is_not_blank_is_taken(tmp_path, name, blank):
    cover, page = Image.new("L", (30, 40), blank), Image.fromarray(GREY)
    flipped = page.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for i, pages in enumerate(([cover, page, flipped], [page, cover, flipped], [cover, cover])):
        found = in_a_folder(tmp_path / str(i), name, pages[0], save_all=True,
                            append_images=pages[1:])
        assert (found == (blank if i == 2 else GREY[..., None])).all()


def exif(*tags) -> bytes:
    """Tags (number, type, count, 4 bytes) in a block of their own, then 16 bytes for offsets."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
            + struct.pack("<IIII", 1, 0, 1, 0))


TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
MAKE, GPS = 0x010F, 0x8825


@pytest.mark.parametrize("tags", [
    pytest.param(exif(*tags), id=what) for what, tags in {
        "a Make of type RATIONAL": [(MAKE, 5, 1, struct.pack("<I", 38)), TURN],
        "a Make that lies behind the end": [(MAKE, 2, 99, struct.pack("<I", 9999)), TURN],
        "a Make of an unknown type": [(MAKE, 77, 1, bytes(4)), TURN],
        "GPS that leads nowhere": [TURN, (GPS, 4, 1, struct.pack("<I", 9999))],
        "GPS that is no number": [TURN, (GPS, 2, 4, b"here")],
        "an orientation of four bytes": [(0x0112, 4, 1, struct.pack("<I", 6))],
        "an orientation as a byte": [(0x0112, 1, 1, b"\6\0\0\0")],
        "an orientation as text": [(0x0112, 2, 2, b"6\0\0\0")],
        "an orientation twice": [(0x0112, 3, 2, struct.pack("<HH", 6, 6))]}.items()])
def test_a_photo_is_turned_whatever_its_other_tags_are(tmp_path, tags):
    for name in ("a.jpg", "a.png", "a.webp"):
        image = Image.fromarray(np.tile(np.uint8([0, 255])[np.arange(32) // 16], (16, 1)))
        turned = in_a_folder(tmp_path / name, name, image, exif=tags, quality=95)
        assert turned.shape[:2] == (32, 16), name
        assert turned[:14].max() < 30 and turned[18:].min() > 225  # the right side comes below


@pytest.mark.parametrize("tags", [
    b"Exif\0\0", b"Exif\0\0no tags at all", exif(TURN)[:20],
    exif((0x0112, 5, 1, struct.pack("<I", 34))), exif((0x0112, 3, 1, b"\x63\0\0\0"))])
def test_a_photo_whose_orientation_cannot_be_read_stays_as_it_is(tmp_path, tags):
    image = in_a_folder(tmp_path / "set", "a.png", Image.fromarray(SEEN), exif=tags)
    assert np.array_equal(image, SEEN)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_every_orientation_is_applied_once_in_every_format(tmp_path, name):
    sideways, tag = SEEN.transpose(1, 0, 2), Image.Exif()
    for orientation, wanted in enumerate([
            SEEN, SEEN[:, ::-1], SEEN[::-1, ::-1], SEEN[::-1], sideways, sideways[:, ::-1],
            sideways[::-1, ::-1], sideways[::-1]], 1):
        tag[0x0112] = orientation
        found = in_a_folder(tmp_path / str(orientation), name, Image.fromarray(SEEN), exif=tag)
        assert np.array_equal(found, wanted), orientation


def packed(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(SEEN).save(file, kind)
    return file.getvalue()


def test_images_are_found_by_content_and_the_rest_is_counted_by_kind(tmp_path):
    images = {"a.jfif": "JPEG", "b.avif": "AVIF", "no ending": "PNG", "c.PNG": "PNG",
              "d.jp2": "JPEG2000", "e.dat": "TIFF", "f.tga": "TGA", "g.ico": "ICO",
              "h.jpg.part 1": "JPEG"}
    if "HEIF" in Image.SAVE:  # of the extra `photos`
        images |= {"i.heic": "HEIF", "j": "HEIF"}
    others = {"notes.txt": b"text", "more.TXT": b"P5 is a road", "README": b"",
              "IMG_1.HEIC": bytes(4) + b"ftypheic" + bytes(99), "raw.NEF": packed("TIFF"),
              "IMG_2.HEIC": struct.pack(">I", 24) + b"ftypmif1" + bytes(4) + b"mif1heic" + bytes(9),
              "film.mpg": b"\0\0\1\xb3" + bytes(99), "zeros.bin": bytes(9999),
              ".DS_Store": b"x", "._a.jpg": packed("JPEG"),
              "data.h5": b"\x89HDF\r\n\x1a\n" + bytes(99)}
    others |= {"text.png": b"a text, named as an image"}
    for name, content in others.items() | {(name, packed(kind)) for name, kind in images.items()}:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone").symlink_to("nowhere")
    counted = Counter()
    assert find_images(tmp_path, counted) == sorted([*images, "text.png"])
    assert counted == {".txt": 2, ".heic": 2, ".nef": 1, ".mpg": 1, ".bin": 1, ".h5": 1,
                       "hidden": 2, "without an ending": 2}
    for name in images:
        (tmp_path / "one" / name).mkdir(parents=True)
        (tmp_path / name).rename(tmp_path / "one" / name / name)
        assert decoded(tmp_path / "one" / name / name).shape[2] == 3


def test_a_phones_photo_lies_as_it_was_held_and_one_that_is_not_read_says_what_reads_it(
        tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif")
    half = np.zeros((64, 96, 3), np.uint8)
    half[:32] = 255  # white above
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be shown a quarter to the right
    Image.fromarray(half).save(tmp_path / "IMG_1.HEIC", "HEIF", exif=turned.tobytes(), quality=95)
    found = decoded(tmp_path / "IMG_1.HEIC").astype(int)
    assert found.shape == (96, 64, 3)
    assert found[:, 40:].mean() > 240 and found[:, :24].mean() < 15  # white on the right
    assert kinds_of(Counter({".heic": 2, ".txt": 1})) == "2 .heic, 1 .txt"
    monkeypatch.delitem(Image.OPEN, "HEIF")
    assert kinds_of(Counter({".heic": 2, ".txt": 1})) == (
        "2 .heic (pip install pillow-heif reads them), 1 .txt")


def test_an_image_too_large_to_read_is_named_whatever_its_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)  # Pillow refuses what has twice as many
    Image.fromarray(SEEN).save(tmp_path / "no ending", "PNG")
    with pytest.raises(OSError, match=r"no ending cannot be read .*exceeds limit"):
        load_dataset(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_that_would_wait_for_ever_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    counted = Counter()
    assert find_images(tmp_path, counted) == [] and counted == {"without an ending": 1}


JUNK = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found", ".thumbs")


def test_junk_folders_are_left_out_and_counted_and_none_becomes_a_class(tmp_path):
    places = [*JUNK, "cats", "dogs", "cats/@eaDir/0.png", "dogs/deep/.git", "dogs/Lost+Found",
              "lost+found/more"]
    for i, place in enumerate(places):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(SEEN + np.uint8(i)).save(tmp_path / place / "0.png")
    dataset, counted = load_dataset(tmp_path), Counter()
    assert dataset.paths == ("cats/0.png", "dogs/0.png") and dataset.classes == ("cats", "dogs")
    find_images(tmp_path, counted)
    assert counted == {f"in {name}": 1 for name in JUNK[:5]} | {
        "in @eaDir": 2, "in lost+found": 2, "in Lost+Found": 1, "in hidden folders": 2}


@pytest.mark.parametrize("names, classes", [
    (("train", "test"), ()), (("Training", "VALIDATION", "dev"), ()),
    (("cats", "test"), ("cats", "test"))])
def test_splits_are_no_classes(tmp_path, caplog, names, classes):
    for name in names:
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.fromarray(SEEN).save(tmp_path / name / "deeper" / "0.png")
    dataset = load_dataset(tmp_path)
    assert dataset.classes == classes and (dataset.labels is None) == (not classes)
    assert ("without labels" in caplog.text) == (not classes)
    assert labels_from_folders(dataset.paths, ("cat", "dog"))[1] == classes
