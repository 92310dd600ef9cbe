"""Backbones: official checkpoint formats, damaged ones, transforms, names, devices, dtypes."""

import argparse
import itertools
import pathlib
import socket
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet50
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

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
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
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


def refused(kind, said, path, name="vit_mini_random", device="cpu", dtype="auto"):
    with pytest.raises(kind, match=said) as caught:
        load_backbone(name, device, path, dtype)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def renamed(before, state):
    return {f"{before}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("save, name, content", [
    (torch.save, "a.pth", dict), (save_file, "a.safetensors", dict),
    (save_file, "a.pth", dict), (torch.save, "a.safetensors", dict),  # known by what it holds
    *((torch.save, "a.pth", content) for content in (
        full_checkpoint, partial(full_checkpoint, wrap=""),
        lambda state: {**state, "head.weight": torch.zeros(9, 192), "head.bias": torch.zeros(9)},
        lambda state: {"model": renamed("_orig_mod.module.", state), "epoch": 3},
        lambda state: {"state_dict": renamed("backbone._orig_mod.", state), "args": [1]}))])
def test_checkpoints_of_every_format_and_trainer_load(tmp_path, trained, save, name, content):
    save(content(trained.state_dict()), path := tmp_path / name)
    loaded = load_backbone("vit_mini_random", "cpu", path).model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # only meanwhile


def test_a_position_grid_of_another_size_is_resampled_where_it_is_asked_for(tmp_path, trained):
    torch.save(trained.state_dict(), path := tmp_path / "a.pth")
    backbone = load_backbone(BACKBONES["vit_mini_random"].for_size(48), "cpu", path, "float32")
    found = backbone.model.pos_embed
    assert found.shape == (1, 145, 192) and torch.equal(found[:, :1], trained.pos_embed[:, :1])
    rows = trained.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    due = torch.nn.functional.interpolate(rows, (12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(found[:, 1:], due.flatten(2).mT)
    assert backbone(images_of(2, 48, 48, 3)).shape == (2, 192)
    resnet = load_backbone(BACKBONES["resnet_nano_cpu"].for_size(64), "cpu")
    assert resnet(images_of(2, 64, 64, 3)).shape == (2, resnet.dim)


def test_a_host_that_does_not_answer_is_given_up_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start, answers = time.monotonic(), partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with (socket.create_server(("127.0.0.1", 0)) as silent,
          ThreadingHTTPServer(("127.0.0.1", 0), answers) as server):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        good = f"http://127.0.0.1:{server.server_port}/"
        check_reachable(good)
        check_reachable(f"{good}lacking")  # what is wrong the download says
        check_reachable("http://127.0.0.1:1/refused", good)
        with pytest.raises(OSError, match=r"(?i)no answer within|timed out"):
            check_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.5)
        server.shutdown()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))  # a name server
    with pytest.raises(OSError, match="no answer within"):
        check_reachable("http://example.org/", seconds=0.5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name, host", [("dino_vits16", "dl.fbaipublicfiles.com"),
                                        ("timm:resnet18", "huggingface.co")])
def test_what_cannot_be_had_is_not_tried_again_and_the_file_to_fetch_is_named(
        weights_dir, monkeypatch, capfd, name, host):
    def unreachable(url):
        raise OSError("no name server")

    spec = backbones.find_spec(name)
    for error in ("Network is unreachable", "no name server"):
        said = refused(ConnectionError, f"from {host} .*{error}", None, name)
        assert str(weights_dir / spec.file) in said and spec.url in said
        monkeypatch.setattr(weights, "check_reachable", unreachable)
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("tried"))
    assert list(weights_dir.iterdir()) == [] and capfd.readouterr() == ("", "")


def test_the_feature_of_a_vit_is_its_class_token_after_the_last_norm(tmp_path, trained):
    torch.save(trained.state_dict(), path := tmp_path / "a.pth")
    backbone = load_backbone("vit_mini_random", "cpu", path, "float32")
    images = images_of(3, 32, 32, 3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():  # [B,65,192], normed
        tokens = trained.forward_features((x - IMAGENET[0]) / IMAGENET[1])
    torch.testing.assert_close(backbone(images), tokens[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("content, said", [
    (lambda state: {key: value for key, value in state.items() if "blocks.3" not in key},
     r"not fit vit_mini_random \(vit_tiny.*missing blocks\.3\.norm1\.weight, .* and 9 more"),
    (lambda state: {**state, "mask_token": torch.zeros(1), "extra": torch.zeros(1)},
     r"unexpected mask_token, extra;"),
    (lambda state: {**state, "pos_embed": torch.zeros(1, 197, 192)},
     r"misshapen pos_embed \[1, 197, 192\] for \[1, 65, 192\]"),
    (lambda state: {"teacher": state, "args": pathlib.PurePosixPath("x")},
     r"pickles a pathlib\.PurePosixPath"),
    (lambda state: {"weights": state}, "holds no state dict"),
    (lambda _: [1, 2], "holds no state dict"),
])
def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path, trained, content, said):
    torch.save(content(trained.state_dict()), path := tmp_path / "other.pth")
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


def test_official_files_have_the_names_and_shapes_of_facebooks_and_torchvisions_code(weights_dir):
    due = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384),
           "patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,),
           "norm.weight": (384,), "norm.bias": (384,)}
    parts = {"norm1": (384,), "norm2": (384,), "attn.qkv": (1152, 384), "attn.proj": (384, 384),
             "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
    for i, (part, shape) in itertools.product(range(12), parts.items()):
        due |= {f"blocks.{i}.{part}.weight": shape, f"blocks.{i}.{part}.bias": shape[:1]}
    for name, dim, state in (
            ("dino_vits16", 384, {key: torch.rand(shape) for key, shape in due.items()}),
            ("dino_resnet50", 2048, resnet50().state_dict())):  # its fc is dropped
        torch.save(state, weights_dir / BACKBONES[name].file)
        backbone = load_backbone(name, "cpu")
        assert backbone.dim == dim
        assert all(torch.equal(value, state[key])
                   for key, value in backbone.model.state_dict().items())


def test_timm_names_take_timms_transform_and_a_file_of_their_own(weights_dir):
    name = "timm:vit_tiny_patch16_224.augreg_in21k"
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    save_file(model.state_dict(), weights_dir / "vit_tiny_patch16_224.augreg_in21k.safetensors")
    backbone = load_backbone(name, "cpu", dtype="float32")
    assert (backbone.name, backbone.dim, backbone.spec.input_size) == (name, 192, 224)
    assert backbone.spec.mean == backbone.spec.std == (0.5, 0.5, 0.5)
    torch.testing.assert_close(backbone.model.pos_embed, model.pos_embed)


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
    for shape in ((5, 28, 28, 1), (5, 32, 32, 3)):
        backbone, images = load_backbone("pixels"), images_of(*shape)
        got = backbone(images)
        assert got.dtype == torch.float32 and backbone.dim == np.prod(shape[1:])
        np.testing.assert_allclose(got, images.reshape(5, -1) / 255, atol=1e-7)
        torch.testing.assert_close(backbone(list(images)), got)
    with pytest.raises(ValueError, match="pixels needs images of one size"):
        backbone([images_of(8, 8, 3), images_of(9, 8, 3)])


def bare(size, **options):
    """A backbone whose transform only resizes."""
    spec = BackboneSpec("bare", "bare", input_size=size, mean=(0.0,) * 3, std=(1.0,) * 3, **options)
    return Backbone(spec, torch.nn.Flatten(), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height, width, size", [(32, 32, 224), (300, 257, 224), (64, 64, 32),
                                                 (28, 28, 32)])
def test_resize_is_torchvisions_antialiased_one(height, width, size, interpolation):
    images = images_of(2, height, width, 3)
    got = bare(size, interpolation=interpolation).prepare(images)  # [2,3,S,S]
    due = TF.resize(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, [size, size],
                    InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    torch.testing.assert_close(got, due, rtol=0, atol=1e-5)


def test_images_of_varying_sizes_are_prepared_one_by_one():
    backbone = bare(32)
    images = [images_of(40, 50, 3), images_of(32, 32, 3), images_of(64, 20, 3)]
    got = backbone.prepare(iter(images))
    assert got.shape == (3, 3, 32, 32)
    for image, row in zip(images, got, strict=True):
        torch.testing.assert_close(backbone.prepare(image[None])[0], row)
    same = images_of(4, 48, 48, 3)
    torch.testing.assert_close(backbone.prepare(same), backbone.prepare(list(same)))


def test_grey_images_become_rgb_28_pixels_are_padded_and_other_arrays_refused():
    grey = images_of(4, 28, 28, 1)
    due = np.pad(grey[..., 0] / 255, ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, 1)
    np.testing.assert_allclose(bare(32).prepare(grey), due, atol=1e-6)
    assert bare(224).prepare(grey).shape == (4, 3, 224, 224)
    black = load_backbone("vit_mini_random").prepare(np.zeros((1, 28, 28, 1), np.uint8))
    torch.testing.assert_close(black, (-IMAGENET[0] / IMAGENET[1]).expand(1, 3, 32, 32))
    for other in (grey / 1.0, grey[..., 0], np.zeros((2, 32, 32, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"pass uint8 \[B,H,W,C\]"):
            bare(32).prepare(other)


def test_the_description_follows_weights_transform_and_dtype_and_the_untrained_stay_the_same():
    state = torch.get_rng_state()
    backbone = load_backbone("vit_mini_random", "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    before = backbone.describe()
    torch.rand(1)
    assert load_backbone("vit_mini_random", "cpu").describe() == before
    with torch.no_grad():
        backbone.model.blocks[5].mlp.fc1.bias[3] += 1e-3
    after = backbone.describe()
    assert before.pop("weights_sha256") != after.pop("weights_sha256") and before == after
    assert load_backbone("pixels").describe()["weights_sha256"] is None
    changed = [dict(mean=(0.5,) * 3), dict(std=(0.5,) * 3), dict(interpolation="bilinear"),
               dict(input_size=48)]
    variants = [(replace(backbone.spec, **options), torch.float32) for options in changed]
    variants += [(backbone.spec, torch.float32), (backbone.spec, torch.bfloat16)]
    assert len({str(Backbone(spec, backbone.model, backbone.device, dtype).describe())
                for spec, dtype in variants}) == 6


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
    *(("pixels", {"device": device}, f"device '{device}' is not there; pass auto")
      for device in ("gpu", "cuda:99", "meta")),
    ("pixels", {"dtype": "half"}, "unknown dtype 'half'"),
    ("pixels", {"dtype": "bfloat16"}, "computed in float32 only")])
def test_unknown_names_devices_and_dtypes_are_refused_with_what_there_is(name, options, said):
    refused(ValueError, said, None, name, **options)
