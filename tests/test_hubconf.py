"""torch.hub.load on the repository's folder: which file, which network, and whose `utils`."""

import functools
import http.server
import os
import subprocess
import sys
import threading

import pytest
import torch
import torchvision
from conftest import ROOT
from test_checkpoint import Malicious, published_layout
from torch import nn

import hubconf
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.runtime import files, safetensors_file

load = functools.partial(torch.hub.load, str(ROOT), source="local")


@pytest.fixture(autouse=True)
def hub_folder(tmp_path, monkeypatch):
    """Downloads go to a folder of the test's."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A ResNet-18 checkpoint in the published layout and the encoders in it."""
    torch.manual_seed(0)
    encoders = QueryTargetEncoders(build_backbone("resnet18").module, 512, hidden_dim=8)
    for value in encoders.target_encoder.parameters():
        value.mul_(0.9)
    path = tmp_path_factory.mktemp("published") / "ckpt.pth"
    torch.save(published_layout(encoders), path)
    return path, encoders.eval()


@pytest.fixture
def server(published):
    """A web server on this machine alone that has the published checkpoint: its address, requests.

    It says 404 to anything else.
    """
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=published[0].parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


def features(network, *, size=64):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return network(images)


def test_entry_points_and_dependencies():
    """All that torch.hub offers: what is callable and has no underscore in front."""
    offered = [n for n in dir(hubconf) if callable(getattr(hubconf, n)) and n[0] != "_"]
    assert offered == ["cmsf", "cmsf_resnet18", "cmsf_resnet50"]
    assert hubconf.dependencies == ["torch", "torchvision"]


@pytest.mark.parametrize("encoder", ["query", "target"])
def test_weights_from_a_path(published, encoder):
    path, encoders = published
    model = load("cmsf_resnet18", weights=path, encoder=encoder)
    assert not model.training
    expected = features(getattr(encoders, f"{encoder}_encoder").backbone)
    assert expected.shape == (2, 512)
    assert torch.equal(features(model), expected)


def test_weights_from_urls(published, server, hub_folder):
    """Each address is downloaded once, and those that end in the same name are several."""
    path, encoders = published
    address, asked = server
    expected = features(encoders.query_encoder.backbone)
    url = f"{address}/ckpt.pth"
    for weights in (path.as_uri(), url, url, f"{url}?download=true"):
        model = load("cmsf_resnet18", weights=weights, progress=False)
        assert torch.equal(features(model), expected)
    assert asked == ["/ckpt.pth", "/ckpt.pth?download=true"]
    assert [found.suffix for found in hub_folder.iterdir()] == [".pth"] * 3


def test_urls_that_cannot_be(server, tmp_path, hub_folder):
    address, _ = server
    for url in (f"{address}/none.pth", (tmp_path / "none.pth").as_uri(), "http://127.0.0.1:1/x"):
        with pytest.raises(ValueError, match=f"weights {url}: could not be downloaded"):
            load("cmsf", weights=url, progress=False)
    assert not list(hub_folder.iterdir())


def test_a_checksum(published, hub_folder):
    path, _ = published
    digest = files.sha256(path)
    for good in (digest, digest[:8].upper()):
        load("cmsf_resnet18", weights=path, sha256=good)
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    for weights in (path, path.as_uri()):
        with pytest.raises(ValueError, match=f"its SHA-256 is not {wrong}"):
            load("cmsf_resnet18", weights=weights, sha256=wrong, progress=False)
    assert path.exists() and not list(hub_folder.iterdir())  # what is wrong is not kept


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_exported_files_say_what_they_are(tmp_path, ending):
    """Neither arch nor stem is named; the features are those of the network that was saved."""
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    torch.manual_seed(1)
    backbone = build_backbone("resnet18", small_stem=True).module.eval()
    path, about = tmp_path / f"out.{ending}", {"arch": "resnet18", "small_stem": True}
    if ending == "pth":
        files.save(path, checkpoint.exported(backbone.state_dict(), about))
    else:
        format = checkpoint.EXPORTED
        path.write_bytes(safetensors_file.encode(backbone.state_dict(), about, format=format))
    for weights in (path, path.as_uri()):
        model = load("cmsf", weights=weights, progress=False)
        assert torch.equal(features(model, size=16), features(backbone, size=16))
    with pytest.raises(ValueError, match="arch resnet50"):
        load("cmsf_resnet50", weights=path)
    with pytest.raises(ValueError, match="no target encoder"):
        load("cmsf", weights=path, encoder="target")


def test_without_weights_the_network_is_random():
    for entry, arch, size in (
        ("cmsf_resnet18", "resnet18", 512),
        ("cmsf_resnet50", "resnet50", 2048),
    ):
        torch.manual_seed(4)
        model = load(entry)
        torch.manual_seed(4)
        expected = torchvision.models.get_model(arch, weights=None)
        expected.fc = nn.Identity()
        assert features(model).shape == (2, size)
        assert torch.equal(features(model), features(expected.eval()))
    assert load("cmsf", "mobilenet_v3_small").training is False
    assert load("cmsf", "resnet18", small_stem=True).conv1.kernel_size == (3, 3)


def test_what_cannot_be(published, tmp_path):
    path, _ = published
    for match, entry, options in (
        ("resnet51: unknown", "cmsf", {"arch": "resnet51"}),
        ("encoder both", "cmsf", {"encoder": "both"}),
        ("image_size 40: .* patch size", "cmsf", {"arch": "vit_b_16", "image_size": 40}),
        ("weights no/such.pth: no such file", "cmsf_resnet18", {"weights": "no/such.pth"}),
        ("missing", "cmsf_resnet50", {"weights": path}),
        ("another shape", "cmsf_resnet18", {"weights": path, "small_stem": True}),
    ):
        with pytest.raises(ValueError, match=match) as error:
            load(entry, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("as_url", [False, True])
def test_code_in_a_file_is_not_run(tmp_path, as_url):
    path, trace = tmp_path / "evil.pth", tmp_path / "was_run"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "opt": Malicious(trace)}, path)
    with pytest.raises(ValueError, match=", a pickled object"):
        load("cmsf", weights=path.as_uri() if as_url else path, progress=False)
    assert not trace.exists()


def test_a_damaged_download_is_not_kept(tmp_path, published, hub_folder):
    path = tmp_path / "cut.pth"
    path.write_bytes(published[0].read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load("cmsf_resnet18", weights=path.as_uri(), progress=False)
    assert not list(hub_folder.iterdir())
    path.write_bytes(published[0].read_bytes())
    load("cmsf_resnet18", weights=path.as_uri(), progress=False)


# Prints: whose utils there is before, and after; how many features; that nothing else was needed;
# that modules are looked for where they were before (an environment may lie in the repository).
PROGRAM = """
import sys, torch
places = list(sys.path)
if {imported}:
    import utils
    utils.OWNER += " as it was"  # the same module, not one that is imported again
for _ in range(2):
    model = torch.hub.load(sys.argv[1], "cmsf_resnet18", source="local", weights=sys.argv[2])
import utils, utils.helpers
print(utils.OWNER, utils.helpers.OWNER, *model(torch.zeros(1, 3, 32, 32)).shape)
print(*(name for name in ("faiss", "safetensors", "timm") if name in sys.modules))
print(sys.path == places)
"""


@pytest.mark.parametrize("imported", [False, True])
def test_another_package_named_utils(published, tmp_path, imported):
    """In a project with its own `utils`, which it has imported before or imports after."""
    package = tmp_path / "project" / "utils"
    package.mkdir(parents=True)
    for name in ("__init__.py", "helpers.py", "checkpoint.py"):
        (package / name).write_text("OWNER = 'the project'\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(imported=imported), ROOT, published[0]],
        cwd=package.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    owner = "the project" + " as it was" * imported
    assert done.stdout.splitlines() == [f"{owner} the project 1 512", "", "True"]
