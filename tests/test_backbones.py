"""Backbones: official checkpoint formats, damaged ones, transforms, names, devices, dtypes."""

import argparse
import contextlib
import itertools
import pathlib
import socket
import threading
import time
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet50
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as TF2

from tsp_utils import backbones
from tsp_utils.backbones import BACKBONES, Backbone, BackboneSpec, load_backbone
from tsp_utils.files.paths import check_reachable
from tsp_utils.networks import weights

MINI = dict(img_size=32, patch_size=4, num_classes=0)  # vit_mini_random's options, written again
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
            torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))


@pytest.fixture(scope="module")
def trained():
    """A ViT-Ti/4 that no seed of ours gives, standing for trained weights."""
    torch.manual_seed(7)
    return timm.create_model("vit_tiny_patch16_224", **MINI).eval()


@pytest.fixture
def weights_dir(tmp_path, monkeypatch):
    """An empty TSP_DATA/weights, and no network."""
    monkeypatch.setenv("TSP_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(weights, "check_reachable", lambda url: None)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **kwargs:
                        refuse() if pretrained else create(*args, **kwargs))
    folder = tmp_path / "data" / "weights"
    folder.mkdir(parents=True)
    return folder


def refuse(*_, **__):
    raise OSError("Network is unreachable")


def images_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def full_checkpoint(state, wrap="module."):
    """What DINO's own training writes."""
    teacher = {f"{wrap}backbone.{key}": value for key, value in state.items()}
    teacher |= {f"{wrap}head.mlp.0.weight": torch.zeros(8, 192),
                f"{wrap}head.last_layer.weight_v": torch.zeros(16, 8)}
    student = {key: value + 1 for key, value in teacher.items()}
    args = argparse.Namespace(arch="vit_tiny", lr=5e-4, local_crops_scale=(0.05, 0.4))
    return {"student": student, "teacher": teacher, "epoch": 100, "args": args,
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def renamed(before, state):
    return {f"{before}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("save, name, content", [
    (torch.save, "a.pth", dict), (save_file, "a.safetensors", dict),
    (save_file, "a.pth", dict), (torch.save, "a.safetensors", dict),  # known by what it holds
    *((torch.save, "a.pth", content) for content in (
        full_checkpoint, partial(full_checkpoint, wrap=""),
        lambda state: {**state, "head.weight": torch.zeros(1000, 192),
                       "head.bias": torch.zeros(1000)},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state, "args": [1]},
        partial(renamed, "_orig_mod."), partial(renamed, "_orig_mod.module."),
        lambda state: {"model": renamed("module._orig_mod.", state)},
        lambda state: {"state_dict": renamed("module.backbone.", state)}))])
def test_checkpoints_of_every_format_and_trainer_load(tmp_path, trained, save, name, content):
    save(content(trained.state_dict()), path := tmp_path / name)
    loaded = load_backbone("vit_mini_random", "cpu", path).model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # only meanwhile


def test_a_position_grid_of_another_size_is_resampled_where_it_is_asked_for(tmp_path, trained):
    torch.save(trained.state_dict(), path := tmp_path / "a.pth")
    spec = BACKBONES["vit_mini_random"]
    backbone = load_backbone(spec.for_size(48), "cpu", path, "float32")
    found = backbone.model.pos_embed
    assert found.shape == (1, 145, 192) and torch.equal(found[:, :1], trained.pos_embed[:, :1])
    rows = trained.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    due = torch.nn.functional.interpolate(rows, (12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(found[:, 1:], due.flatten(2).mT)
    assert backbone(images_of(2, 48, 48, 3)).shape == (2, 192)
    same = load_backbone(spec.for_size(32), "cpu", path, "float32").model
    assert torch.equal(same.pos_embed, trained.pos_embed)
    resnet = load_backbone(BACKBONES["resnet_nano_cpu"].for_size(64), "cpu")
    assert resnet(images_of(2, 64, 64, 3)).shape == (2, resnet.dim)


@contextlib.contextmanager
def a_host(answer: bytes | None):
    """A server that answers so, or takes calls and never answers; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    call, _ = server.accept()
                    calls.append(call)
                    if answer is not None:
                        call.sendall(answer)
                        call.close()

        calls: list = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/file"


def test_a_host_that_does_not_answer_is_given_up_at_once(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start = time.monotonic()
    found = b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 404 Not Found\r\n\r\n"
    with a_host(None) as silent, a_host(found[0]) as good, a_host(found[1]) as lacking:
        check_reachable(good)
        check_reachable(lacking)  # what is wrong the download says
        check_reachable("http://127.0.0.1:1/refused", good)
        with pytest.raises(OSError, match=r"(?i)no answer within|timed out"):
            check_reachable(silent, seconds=0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))  # a name server
    with pytest.raises(OSError, match="no answer within"):
        check_reachable("http://example.org/", seconds=0.5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name, host", [("dino_vits16", "dl.fbaipublicfiles.com"),
                                        ("timm:resnet18", "huggingface.co")])
def test_what_cannot_be_had_is_not_tried_again(weights_dir, monkeypatch, capfd, name, host):
    def unreachable(url):
        raise OSError("no name server")

    monkeypatch.setattr(weights, "check_reachable", unreachable)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("tried"))
    said = refused(ConnectionError, f"from {host} .*no name server", None, name)
    assert str(weights_dir) in said and capfd.readouterr() == ("", "")


def test_the_feature_of_a_vit_is_its_class_token_after_the_last_norm():
    backbone = load_backbone("vit_mini_random", "cpu", dtype="float32")
    images = images_of(3, 32, 32, 3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():  # [B,65,192], normed
        tokens = backbone.model.forward_features((x - IMAGENET[0]) / IMAGENET[1])
    torch.testing.assert_close(backbone(images), tokens[:, 0], rtol=1e-4, atol=1e-4)
    assert backbone(images).dtype == torch.float32 and backbone.dim == 192
    blocks = backbone.model.blocks
    assert (len(blocks), blocks[0].attn.num_heads, tokens.shape[1:]) == (12, 3, (65, 192))


def refused(kind, said, path, name="vit_mini_random", device="cpu", dtype="auto"):
    with pytest.raises(kind, match=said) as caught:
        load_backbone(name, device, path, dtype)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content, said", [
    (lambda state: {key: value for key, value in state.items() if "blocks.3" not in key},
     r"missing blocks\.3\.norm1\.weight, .*, .* and 9 more"),
    (lambda state: {**state, "mask_token": torch.zeros(1), "extra": torch.zeros(1)},
     r"unexpected mask_token, extra;"),
    (lambda state: {**state, "pos_embed": torch.zeros(1, 197, 192)},
     r"misshapen pos_embed \[1, 197, 192\] for \[1, 65, 192\]"),
    (lambda _: timm.create_model("resnet18", num_classes=0).state_dict(),
     r"does not fit vit_mini_random \(vit_tiny.*missing cls_t"),
    (lambda state: {"teacher": state, "args": pathlib.PurePosixPath("x")},
     r"pickles a pathlib\.PurePosixPath"),
    (lambda state: {"weights": state}, "holds no state dict"),
    (lambda _: [1, 2], "holds no state dict"),
])
def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path, trained, content, said):
    path = tmp_path / "other.pth"
    torch.save(content(trained.state_dict()), path)
    assert str(path) in refused(ValueError, said, path)


@pytest.mark.parametrize("save", [
    torch.save, partial(torch.save, _use_new_zipfile_serialization=False), save_file,
    lambda _, path: path.write_text("<html>404</html>" * 400), lambda _, path: path.touch()])
def test_what_is_not_there_cut_off_or_no_weights_file_is_refused_by_name(tmp_path, trained, save):
    path = tmp_path / ("damaged.safetensors" if save is save_file else "damaged.pth")
    save(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert str(path) in refused(ValueError, "truncated or not a weights file", path)
    refused(FileNotFoundError, r"nowhere\.pth", tmp_path / "nowhere.pth")
    refused(FileNotFoundError, "are not there", tmp_path)
    refused(ValueError, "pixels has no weights", path, "pixels")
    refused(ValueError, "not a dictionary of patches", path, "patch_kmeans")


def test_vits16_has_the_names_and_shapes_of_facebooks_code(weights_dir):
    due = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384),
           "patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,),
           "norm.weight": (384,), "norm.bias": (384,)}
    parts = {"norm1": (384,), "norm2": (384,), "attn.qkv": (1152, 384), "attn.proj": (384, 384),
             "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
    for i, (part, shape) in itertools.product(range(12), parts.items()):
        due |= {f"blocks.{i}.{part}.weight": shape, f"blocks.{i}.{part}.bias": shape[:1]}
    state = {key: torch.full(shape, 0.01) for key, shape in due.items()}
    torch.save(state, weights_dir / "dino_deitsmall16_pretrain.pth")
    backbone = load_backbone("dino_vits16", "cpu")
    assert backbone.dim == 384
    assert all((value == 0.01).all() for value in backbone.model.state_dict().values())


def test_resnet50_takes_torchvisions_names_and_drops_fc(weights_dir):
    reference = resnet50().eval()
    torch.save(reference.state_dict(), weights_dir / "dino_resnet50_pretrain.pth")
    backbone = load_backbone("dino_resnet50", "cpu", dtype="float32")
    x = backbone.prepare(images_of(2, 32, 32, 3))
    reference.fc = torch.nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(backbone.encode(x), reference(x), rtol=1e-3, atol=1e-4)
    assert backbone.dim == 2048


def test_timm_names_take_timms_transform_and_a_file_of_their_own(weights_dir):
    name = "timm:vit_tiny_patch16_224.augreg_in21k"
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    save_file(model.state_dict(), weights_dir / "vit_tiny_patch16_224.augreg_in21k.safetensors")
    backbone = load_backbone(name, "cpu", dtype="float32")
    assert (backbone.name, backbone.dim, backbone.spec.input_size) == (name, 192, 224)
    assert backbone.spec.mean == backbone.spec.std == (0.5, 0.5, 0.5)
    torch.testing.assert_close(backbone.model.pos_embed, model.pos_embed)


@pytest.mark.parametrize("name", ["dino_resnet50", "dino_vits16", "dino_vitb16", "timm:resnet18"])
def test_without_network_the_file_to_fetch_is_named_and_none_is_left(weights_dir, name):
    said = refused(ConnectionError, "Network is unreachable", None, name)
    spec = backbones.find_spec(name)
    assert str(weights_dir / spec.file) in said and spec.url in said
    assert list(weights_dir.iterdir()) == []


def test_a_download_is_kept_only_when_it_is_whole(weights_dir, monkeypatch):
    state = timm.create_model("resnet50", num_classes=0).state_dict()

    def torn(url, path):
        torch.save(state, path)
        with open(path, "r+b") as file:
            file.truncate(100_000)

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", torn)
    refused(ConnectionError, "truncated", None, "dino_resnet50")
    assert list(weights_dir.iterdir()) == []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda _, path: torch.save(state, path))
    with monkeypatch.context() as planted, pytest.raises(KeyboardInterrupt):  # at its end
        planted.setattr(weights, "file_sha256", stop)
        load_backbone("dino_resnet50", "cpu")
    assert list(weights_dir.iterdir()) == []
    load_backbone("dino_resnet50", "cpu")
    file = weights_dir / "dino_resnet50_pretrain.pth"
    assert {path.name for path in weights_dir.iterdir()} == {file.name, f"{file.name}.sha256"}
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    load_backbone("dino_resnet50", "cpu")
    torch.save({key: value + 1 for key, value in state.items()}, file)  # another one in its place
    refused(ValueError, "is not the file that was downloaded: delete it", None, "dino_resnet50")


def test_the_table_agrees_with_timm_and_with_the_published_figures():
    for name in ("dino_vits16", "dino_vitb16"):
        spec = BACKBONES[name]
        config = timm.get_pretrained_cfg(spec.architecture)
        assert config.url == spec.url and spec.url.endswith(f"/{spec.file}")
        assert (config.mean, config.std, config.interpolation) == (
            spec.mean, spec.std, spec.interpolation)
        assert config.input_size == (3, spec.input_size, spec.input_size)
    figures = {name: spec.published_knn for name, spec in BACKBONES.items() if spec.published_knn}
    assert figures == {"dino_resnet50": 67.5, "dino_vits16": 74.5, "dino_vitb16": 76.1}
    assert [BACKBONES[name].dim for name in figures] == [2048, 384, 768]


def test_pixels_are_flattened_as_they_are():
    backbone = load_backbone("pixels")
    assert backbone.dim is None
    for shape in ((5, 28, 28, 1), (5, 32, 32, 3)):
        images = images_of(*shape)
        got = backbone(images)
        assert got.dtype == torch.float32 and backbone.dim == got.shape[1] == np.prod(shape[1:])
        np.testing.assert_allclose(got, images.reshape(5, -1) / 255, atol=1e-7)
        torch.testing.assert_close(backbone(list(images)), got)
    with pytest.raises(ValueError, match="pixels needs images of one size"):
        backbone([images_of(8, 8, 3), images_of(9, 8, 3)])
    with pytest.raises(ValueError, match="computed in float32 only"):
        load_backbone("pixels", dtype="bfloat16")


def bare(size, **options):
    """A backbone whose transform only resizes."""
    spec = BackboneSpec("bare", "bare", input_size=size, mean=(0.0,) * 3, std=(1.0,) * 3, **options)
    return Backbone(spec, torch.nn.Flatten(), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height, width, size", [(32, 32, 224), (96, 96, 224), (300, 257, 224),
                                                 (64, 64, 32), (28, 28, 32)])
def test_resize_is_torchvisions_antialiased_one_and_pils(height, width, size, interpolation):
    smooth = np.asarray(Image.fromarray(images_of(6, 6, 3) // 2 + 64).resize((width, height)))
    images = np.stack([images_of(height, width, 3), smooth])
    got = bare(size, interpolation=interpolation).prepare(images)  # [2,3,S,S]
    mode = InterpolationMode(interpolation)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    due = TF2.resize(x / 255, [size, size], mode, antialias=True).clamp(0, 1)
    torch.testing.assert_close(got, due, rtol=0, atol=1e-5)
    pil = [TF.to_tensor(TF.resize(Image.fromarray(image), [size, size], mode)) for image in images]
    noise, photo = (torch.stack(pil) - got).abs()
    # PIL rounds to bytes and clips after each of its two passes, which only noise makes visible
    assert photo.max() < 2 / 255 and noise.mean() < 1 / 255
    aliased = TF2.resize(x / 255, [size, size], mode, antialias=False).clamp(0, 1)
    assert size > height or (aliased - got).abs().max() > 10 / 255


def test_images_of_varying_sizes_are_prepared_one_by_one():
    backbone = load_backbone("vit_mini_random", "cpu", dtype="float32")
    images = [images_of(40, 50, 3), images_of(32, 32, 3), images_of(64, 20, 3)]
    got = backbone.prepare(images)
    assert got.shape == (3, 3, 32, 32)
    for image, row in zip(images, got, strict=True):
        torch.testing.assert_close(backbone.prepare(image[None])[0], row)
    same = images_of(4, 48, 48, 3)
    torch.testing.assert_close(backbone.prepare(same), backbone.prepare(iter(same)))


def test_grey_images_become_rgb_28_pixels_are_padded_and_other_arrays_refused():
    grey = images_of(4, 28, 28, 1)
    got = bare(32).prepare(grey)
    due = np.pad(grey[..., 0] / 255, ((0, 0), (2, 2), (2, 2)))
    for channel in range(3):
        np.testing.assert_allclose(got[:, channel], due, atol=1e-6)
    assert bare(224).prepare(grey).shape == (4, 3, 224, 224)
    black = load_backbone("vit_mini_random").prepare(np.zeros((1, 28, 28, 1), np.uint8))
    torch.testing.assert_close(black, (-IMAGENET[0] / IMAGENET[1]).expand(1, 3, 32, 32))
    for other in (grey / 1.0, grey[..., 0], np.zeros((2, 32, 32, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"pass uint8 \[B,H,W,C\]"):
            bare(32).prepare(other)


def test_the_description_follows_the_weights_as_they_are_and_the_untrained_are_always_the_same():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    backbone = load_backbone("vit_mini_random", "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    before = backbone.describe()
    torch.manual_seed(12)
    assert load_backbone("vit_mini_random", "cpu").describe() == before
    with torch.no_grad():
        backbone.model.blocks[5].mlp.fc1.bias[3] += 1e-3
    after = backbone.describe()
    assert before.pop("weights_sha256") != after.pop("weights_sha256") and before == after
    assert load_backbone("pixels").describe()["weights_sha256"] is None
    assert load_backbone("vit_mini_random", "cpu", dtype="float32").describe()["dtype"] == "float32"


def test_bfloat16_agrees_with_float32_where_the_cpu_gains_from_it():
    if not backbones.gains_from_bf16(torch.device("cpu")):
        pytest.skip("this CPU has no AMX tiles: auto is float32 here")
    smooth = [Image.fromarray(images_of(5, 5, 3, seed=i)).resize((32, 32)) for i in range(64)]
    images = np.stack([np.asarray(image) for image in smooth])
    auto = load_backbone("vit_mini_random", "cpu")
    assert auto.dtype == torch.bfloat16
    due = load_backbone("vit_mini_random", "cpu", dtype="float32")(images)
    got = auto(images)
    assert got.dtype == torch.float32 and not torch.equal(got, due)
    centre = due.mean(0)  # what all images share would hide a difference
    assert torch.cosine_similarity(got - centre, due - centre).mean() > 0.99


@pytest.mark.parametrize("name, options, said", [
    *((name, {}, f"nearest one is '{near}.*all are pixels, vit_mini_random") for name, near in (
        ("dino_vits", "dino_vits16'"), ("pixel", "pixels'"), ("vit_small", "timm:"),
        ("timm:resnet50.nope", "timm:resnet50"),
        ("timm:vit_tiny_patch16", "timm:vit_tiny_patch16"))),
    *(("pixels", {"device": device}, f"device '{device}' is not there")
      for device in ("gpu", "cuda:99", "meta")),
    ("pixels", {"device": "gpu"}, "device 'gpu' is not there; pass auto"),
    ("pixels", {"dtype": "half"}, "unknown dtype 'half'")])
def test_unknown_names_devices_and_dtypes_are_refused_with_what_there_is(name, options, said):
    refused(ValueError, said, None, name, **options)
