"""Pulling a model from a folder or from the hub's cache. A failed pull leaves nothing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

from helios import catalog
from helios.catalog import ModelEntry
from helios.chat_template import read_chat_template
from helios.engine import Engine, EngineSettings
from helios.errors import CheckpointError, InvalidRequestError, SettingsError, UnknownModelError
from helios.hub import pull
from helios.weight_map import WeightMap
from tests.opt_variants import FORMS, Form, Head, save_tensors, save_variant

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("head", ["shared", "linear"])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_copied_with_everything_that_serving_needs(
    tmp_path: Path, form: Form, head: Head
) -> None:
    source, models = tmp_path / "source", tmp_path / "models"
    save_variant(source, "pre-norm", 1, form, (2, 6), head)
    (source / "README.md").write_text("its card")
    copied = names(source)
    for stray in ("modeling_custom.py", "optimizer.pt", "flax_model.msgpack"):
        (source / stray).write_text("raise SystemExit")
    told: list[tuple[str, int, int]] = []
    entry = pull(str(source), models, progress=lambda *step: told.append(step))
    assert (entry.name, entry.path, entry.exit_layers) == ("source", models / "source", (2, 6))
    assert names(entry.path) == copied
    assert all((entry.path / name).read_bytes() == (source / name).read_bytes() for name in copied)
    assert sorted(name for name, _, _ in told) == copied
    assert [(done, total) for _, done, total in told] == [(n + 1, len(copied)) for n in range(len(copied))]
    # The files are copies, because the source may change afterwards.
    assert all((entry.path / name).stat().st_ino != (source / name).stat().st_ino for name in copied)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1, "bin")
    save_variant(tmp_path / "source", "pre-norm", 1, "safetensors")
    entry = pull(str(tmp_path / "source"), tmp_path / "models", name="renamed")
    assert entry.name == "renamed"
    assert "model.safetensors" in names(entry.path)
    assert "pytorch_model.bin" not in names(entry.path)


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_comes_along_unless_it_cannot_render_a_message(tmp_path: Path, file: str) -> None:
    source, models = tmp_path / "source", tmp_path / "models"
    save_variant(source, "pre-norm", 1)

    def write(template: str) -> None:
        (source / file).write_text(template if "jinja" in file else json.dumps({"chat_template": template}))

    for broken, reason in (("{{ tools | length }}", "NoneType"), ("{% if %}", "not a valid template")):
        write(broken)
        with pytest.raises(CheckpointError, match=f"{file}.*{reason}"):
            pull(str(source), models)
        assert not models.exists() or names(models) == []
    write("{{ messages[0].content }}")
    template = read_chat_template(pull(str(source), models).path)
    assert template is not None
    assert template.text == "{{ messages[0].content }}"


def test_a_taken_name_is_replaced_only_when_forced(tmp_path: Path) -> None:
    models = tmp_path / "models"
    save_variant(tmp_path / "source", "pre-norm", 1)
    save_variant(models / "source", "gelu", 2)
    with pytest.raises(CheckpointError, match="source exists; choose another name, or --force"):
        pull(str(tmp_path / "source"), models)
    assert catalog.find_model(models, "source").config.activation == "gelu"
    assert pull(str(tmp_path / "source"), models, force=True).config.activation == "relu"
    assert names(models) == ["source"]


@pytest.mark.parametrize(
    "broken", ["no OPT", "no config", "no weights", "missing shard", "truncated", "no tokenizer"]
)
def test_a_model_that_cannot_be_served_never_appears(tmp_path: Path, broken: str) -> None:
    source, models = tmp_path / "source", tmp_path / "models"
    save_variant(source, "pre-norm", 1, "sharded-safetensors")
    save_variant(models / "source", "gelu", 2)
    config, shard = source / "config.json", WeightMap.read(source).files[1]
    if broken == "no OPT":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    elif broken == "no config":
        config.unlink()
    elif broken == "no weights":
        (source / "model.safetensors.index.json").unlink()
    elif broken == "missing shard":
        shard.unlink()
    elif broken == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (source / "tokenizer.json").unlink()
    reason = {
        "no OPT": r"config\.json: model_type is 'gpt2'",
        "no config": r"config\.json is missing",
        "no weights": "holds no weights",
        "missing shard": f"{shard.name} is missing",
        "truncated": f"{shard.name} is truncated",
        "no tokenizer": "holds no tokenizer",
    }[broken]
    with pytest.raises(CheckpointError, match=reason):
        pull(str(source), models, name="new")
    with pytest.raises(CheckpointError, match=reason):
        pull(str(source), models, force=True)
    assert names(models) == ["source"]
    assert catalog.find_model(models, "source").config.activation == "gelu"


@pytest.mark.parametrize("form", ["safetensors", "sharded-safetensors", "bin"])
@pytest.mark.parametrize(
    "broken",
    [
        "lacks a tensor",
        "another shape",
        "another type",
        "NaN in the last layer",
        "infinite exit head",
        "lacks an exit head",
        "another tokenizer",
        "garbled tokenizer",
    ],
)
def test_what_no_load_would_accept_is_refused_before_anything_is_written(
    tmp_path: Path, broken: str, form: Form
) -> None:
    source, models, exits = (
        tmp_path / "source",
        tmp_path / "models",
        tmp_path / "source" / "exits.safetensors",
    )
    model = save_variant(source, "pre-norm", 1, form, exits=(2, 4, 6), head="linear")
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    name, head = "model.decoder.layers.5.fc2.weight", "exits.4.linear.weight"
    heads = load_file(exits)
    if broken == "lacks a tensor":
        del tensors[name]
    elif broken == "another shape":
        tensors[name] = tensors[name].T.contiguous()
    elif broken == "another type":
        tensors[name] = tensors[name].to(torch.int8)
    elif broken == "NaN in the last layer":
        tensors[name][3, 4] = float("nan")
    elif broken == "infinite exit head":
        heads[head][3, 4] = float("inf")
    elif broken == "lacks an exit head":
        del heads[head]
    elif broken == "another tokenizer":
        with (source / "tokenizer.json").open("a") as file:
            file.write("\n")
    else:
        (source / "tokenizer.json").write_text("{}")
        facts = json.loads((source / "helios.json").read_text()) | {"tokenizer_id": None}
        (source / "helios.json").write_text(json.dumps(facts))
    save_tensors(source, tensors, form)
    save_file(heads, exits)
    reason = {
        "lacks a tensor": r"no tensor layers\.5\.fc2\.weight",
        "another shape": r"layers\.5\.fc2\.weight has shape \[64, 32\]",
        "another type": r"layers\.5\.fc2\.weight is stored as .*(I8|int8)",
        "NaN in the last layer": r"layers\.5\.fc2\.weight holds NaN",
        "infinite exit head": r"exits\.safetensors: exits\.4\.linear\.weight holds NaN or infinite",
        "lacks an exit head": r"no tensor exits\.4\.linear\.weight",
        "another tokenizer": r"tokenizer\.json is not the tokenizer",
        "garbled tokenizer": r"tokenizer\.json is corrupt",
    }[broken]
    with pytest.raises(CheckpointError, match=reason) as raised:
        pull(str(source), models)
    # The message names the source, so that people can look at it.
    assert str(source) in raised.value.message
    assert not models.exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_tied_weights_under_the_heads_name_is_pulled(tmp_path: Path, form: Form) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1, form, tied_as="lm_head")
    entry = pull(str(tmp_path / "source"), tmp_path / "models")
    Engine.load(entry.path, settings=EngineSettings(memory_bytes=64 << 20))


def test_pulling_without_the_engine_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    monkeypatch.setitem(sys.modules, "helios.engine.plan", None)
    with pytest.raises(SettingsError, match=r"install helios-serving\[engine\]"):
        pull(str(tmp_path / "source"), tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["../outside", ".hidden", "a/b", "", "a b"])
def test_a_name_cannot_reach_outside_the_models_directory(tmp_path: Path, name: str) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    if name:
        with pytest.raises(InvalidRequestError, match="cannot name a model"):
            pull(str(tmp_path / "source"), tmp_path / "models", name=name)
    else:
        assert pull(str(tmp_path / "source"), tmp_path / "models", name=name).name == "source"
    assert names(tmp_path) in (["models", "source"], ["source"])


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    with pytest.raises(InvalidRequestError, match="has no revisions"):
        pull(str(tmp_path / "source"), tmp_path / "models", revision="main")


def test_what_is_neither_folder_nor_repository_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="neither a folder nor a repository id"):
        pull(str(tmp_path / "gone" / "model"), tmp_path / "models")


# The hub's library reads its settings once, when it is imported. So this runs in a separate process.
PULL = """
import sys
from pathlib import Path
from helios.errors import HeliosError
from helios.hub import pull
try:
    print(pull(sys.argv[1], Path(sys.argv[2]), revision=sys.argv[3] if len(sys.argv) > 3 else None).path)
except HeliosError as error:
    print(type(error).__name__, error)
"""


def pull_from_hub(cache: Path, repository: str, models: Path, *revision: str, endpoint: str = "") -> str:
    """The output of a pull with `cache` as the hub's cache and the hub at `endpoint` (None: offline)."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} if endpoint else {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PULL, repository, str(models), *revision],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()


def fill_cache(cache: Path, repository: str, source: Path) -> Path:
    """Stores a checkpoint like the hub's cache: blobs, and a snapshot with links to them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    shutil.copytree(source, root / "blobs")
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    return snapshot


@pytest.mark.parametrize("form", FORMS)
def test_a_repository_in_the_cache_is_pulled_offline(tmp_path: Path, form: Form) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1, form, exits=(2, 6), head="norm")
    copied = names(tmp_path / "source")
    (tmp_path / "source" / "modeling_custom.py").write_text("raise SystemExit")
    fill_cache(tmp_path / "cache", "team/tiny", tmp_path / "source")
    models = tmp_path / "models"
    assert pull_from_hub(tmp_path / "cache", "team/tiny", models) == str(models / "tiny")
    # The model does not depend on the cache, which may be deleted.
    shutil.rmtree(tmp_path / "cache")
    entry: ModelEntry = catalog.find_model(models, "tiny")
    assert entry.exit_layers == (2, 6)
    assert names(entry.path) == copied
    assert not any(file.is_symlink() for file in entry.path.iterdir())
    assert all(
        (entry.path / name).read_bytes() == (tmp_path / "source" / name).read_bytes() for name in copied
    )


def test_offline_without_the_repository_says_what_to_do(tmp_path: Path) -> None:
    models = tmp_path / "models"
    said = pull_from_hub(tmp_path / "cache", "team/tiny", models)
    assert said.startswith(
        "UnavailableError team/tiny could not be fetched and is not whole in the local cache"
    )
    assert "pull from a folder" in said
    assert not models.exists()


def test_a_cached_repository_without_weights_says_so(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    snapshot = fill_cache(tmp_path / "cache", "team/tiny", tmp_path / "source")
    (snapshot / "model.safetensors").unlink()
    said = pull_from_hub(tmp_path / "cache", "team/tiny", tmp_path / "models", COMMIT)
    assert said.startswith("CheckpointError") and "holds no weights" in said


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that a download uses. It serves one folder as `team/tiny`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.sent: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in (f"/api/models/team/tiny/revision/{at}" for at in ("main", COMMIT)):
            files = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            self.answer(json.dumps({"id": "team/tiny", "sha": COMMIT, "siblings": files}).encode())
        elif path == f"/api/models/team/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}
                for file in self.server.folder.iterdir()
            ]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/team/tiny/resolve/{COMMIT}/"):
            file = self.server.folder / path.rpartition("/")[2]
            if self.command == "GET":
                self.server.sent.append(file.name)
            self.answer(file.read_bytes(), etag(file))
        else:
            known = path.startswith("/api/models/team/tiny/")
            self.answer(b"{}", status=404, error="RevisionNotFound" if known else "RepoNotFound")

    def answer(self, body: bytes, tag: str = "", status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        if tag:
            self.send_header("ETag", f'"{tag}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Logs nothing."""


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with the folder `source` of the test."""
    (tmp_path / "source").mkdir()
    server = Hub(tmp_path / "source")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("form", FORMS)
def test_only_what_serving_needs_is_downloaded(tmp_path: Path, hub: Hub, form: Form) -> None:
    if "safetensors" in form:
        # Pickles are not downloaded if there are safetensors.
        save_variant(hub.folder, "pre-norm", 1, "bin")
    save_variant(hub.folder, "pre-norm", 1, form, exits=(2, 6), head="norm")
    weights = [file.name for file in WeightMap.read(hub.folder).files]
    for stray in ("modeling_custom.py", "optimizer.pt", "flax_model.msgpack", "model.fp16.safetensors"):
        (hub.folder / stray).write_text("raise SystemExit")
    models = tmp_path / "models"
    said = pull_from_hub(tmp_path / "cache", "team/tiny", models, endpoint=hub.endpoint)
    assert said == str(models / "tiny")
    entry = catalog.find_model(models, "tiny")
    assert entry.exit_layers == (2, 6)
    assert all(
        (entry.path / name).read_bytes() == (hub.folder / name).read_bytes() for name in names(entry.path)
    )
    assert set(weights) <= set(names(entry.path))
    # Each file was sent once, and no file that the model does not need.
    assert sorted(hub.sent) == names(entry.path)


def test_a_repository_that_is_no_opt_is_refused_before_its_weights_come(tmp_path: Path, hub: Hub) -> None:
    save_variant(hub.folder, "pre-norm", 1)
    config = hub.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    said = pull_from_hub(tmp_path / "cache", "team/tiny", tmp_path / "models", endpoint=hub.endpoint)
    assert said.startswith("CheckpointError") and "model_type is 'llama'" in said
    assert "model.safetensors" not in hub.sent


def test_unknown_repositories_and_revisions_are_said_so(tmp_path: Path, hub: Hub) -> None:
    save_variant(hub.folder, "pre-norm", 1)
    cache, models = tmp_path / "cache", tmp_path / "models"
    said = pull_from_hub(cache, "team/other", models, endpoint=hub.endpoint)
    assert said.startswith("UnknownModelError no repository team/other on the hub")
    said = pull_from_hub(cache, "team/tiny", models, "v9", endpoint=hub.endpoint)
    assert said.startswith("UnknownModelError no repository team/tiny at revision v9 on the hub")


def test_a_hub_that_is_down_is_said_so(tmp_path: Path, hub: Hub) -> None:
    endpoint = hub.endpoint.replace(str(hub.server_port), "1")
    said = pull_from_hub(tmp_path / "cache", "team/tiny", tmp_path / "models", endpoint=endpoint)
    assert said.startswith("UnavailableError team/tiny could not be fetched")
