"""Pulling a model from the hub or its cache. A failed pull leaves nothing."""

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

from helios import catalog
from helios.catalog import ModelEntry
from helios.weight_map import WeightMap
from tests.opt_variants import FORMS, Form, save_variant

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


# The hub's library reads its settings once, when it is imported. So this runs in a separate process.
PULL = """
import sys
from pathlib import Path
from helios.errors import HeliosError
from helios.sources.pull import pull
try:
    revision = sys.argv[3] if len(sys.argv) > 3 else None
    print(pull(sys.argv[1], Path(sys.argv[2]), revision=revision).entry.path)
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


def test_a_repository_of_another_architecture_is_refused_before_its_weights_come(
    tmp_path: Path, hub: Hub
) -> None:
    save_variant(hub.folder, "pre-norm", 1)
    config = hub.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    said = pull_from_hub(tmp_path / "cache", "team/tiny", tmp_path / "models", endpoint=hub.endpoint)
    assert said.startswith("CheckpointError") and "model_type is 'gpt2'" in said
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
