"""The models of a models directory, and the known facts about their exits. Does not import torch."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import helios
from helios.architectures.registry import read_config
from helios.architectures.spec import ModelConfig
from helios.chat_template import TEMPLATE_FILES
from helios.errors import CheckpointError, SettingsError, UnknownDepthError, UnknownModelError
from helios.json_object import read_json_object
from helios.weight_map import WeightMap

FACTS_FILE = "helios.json"
EXITS_FILE = "exits.safetensors"
TOKENIZER_FILE = "tokenizer.json"
# A checkpoint from the hub may have these files instead of tokenizer.json.
SLOW_TOKENIZER_FILES = ("vocab.json", "merges.txt")
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    *SLOW_TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *TEMPLATE_FILES,
)
# The folder of a models directory with exits of models that are not there. It is not a model.
EXITS_DIR = "exits"
MODELS_DIR_VARIABLE = "HELIOS_MODELS_DIR"
FORMAT_VERSION = 1

ExitHeadKind = Literal["shared", "norm", "linear"]
_EXIT_HEAD_KINDS = ("shared", "norm", "linear")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An exit in one precision, compared with the same exit in float32 on given text."""

    # A share: 0.01 means that the perplexity is 1 % higher.
    perplexity_increase: float
    # Share of positions with the same most likely next token.
    agreement: float
    tokens: int


@dataclass(frozen=True, slots=True)
class EarlyExitFacts:
    """The contents of helios.json, which lies beside the weights (docs/early-exit-facts.md).

    exit_layers: layers after which a token may be read out, ascending; the last one is the model's last
    layer. exit_head: `shared`: all exits use the model's final norm; `norm`: each exit has its own norm;
    `linear`: each exit has its own norm, followed by a square matrix. thresholds: by exit layer, the
    confidence at which a token may leave. precisions: results of `helios models measure`, by precision and
    exit layer. weights_digest: of the weights that the exits belong to (`helios.weights_digest`), for exits
    that ship without them.
    """

    exit_layers: tuple[int, ...]
    exit_head: ExitHeadKind
    default_depth: int
    thresholds: Mapping[int, float] = field(default_factory=dict)
    tokenizer_id: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    precisions: Mapping[str, Mapping[int, Fidelity]] = field(default_factory=dict)
    weights_digest: str | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers of the whole model."""
        return self.exit_layers[-1]

    @classmethod
    def read(cls, path: Path, num_layers: int) -> Self:
        """The facts of a checkpoint directory. Without helios.json only the last layer is an exit.

        Raises CheckpointError naming the file and the wrong field.
        """
        file = path / FACTS_FILE
        if not file.exists():
            return cls(exit_layers=(num_layers,), exit_head="shared", default_depth=num_layers)
        return cls._from_fields(read_json_object(file), file, num_layers)

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any], file: Path, num_layers: int) -> Self:
        def error(name: str, problem: str) -> CheckpointError:
            return CheckpointError(f"{file}: {name} {problem}, not {fields.get(name)!r}")

        if fields.get("format_version") != FORMAT_VERSION:
            raise error("format_version", f"must be {FORMAT_VERSION}")
        layers = fields.get("exit_layers")
        if (
            not isinstance(layers, list)
            or not all(_is_whole(layer) for layer in layers)
            or any(low >= high for low, high in zip([0, *layers], layers, strict=False))
            or layers[-1:] != [num_layers]
        ):
            raise error("exit_layers", f"must ascend from at least 1 to the last layer ({num_layers})")
        if fields.get("exit_head") not in _EXIT_HEAD_KINDS:
            raise error("exit_head", f"must be one of {', '.join(_EXIT_HEAD_KINDS)}")
        default_depth = fields.get("default_depth", num_layers)
        if not _is_whole(default_depth) or default_depth not in layers:
            raise error("default_depth", f"must be one of exit_layers {layers}")
        thresholds = fields.get("thresholds", {})
        if not isinstance(thresholds, dict) or not all(
            key in map(str, layers) and _is_probability(value) for key, value in thresholds.items()
        ):
            raise error("thresholds", f"must map exit_layers {layers} to confidences from 0 to 1")
        tokenizer_id = fields.get("tokenizer_id")
        if tokenizer_id is not None and not isinstance(tokenizer_id, str):
            raise error("tokenizer_id", "must be the tokenizer's SHA-256 in hexadecimal")
        weights_digest = fields.get("weights_digest")
        if weights_digest is not None and not isinstance(weights_digest, str):
            raise error("weights_digest", "must be the weights' SHA-256 in hexadecimal")
        training = fields.get("training", {})
        if not isinstance(training, dict):
            raise error("training", "must be an object")
        try:
            precisions = {
                precision: {int(layer): Fidelity(**found) for layer, found in by_layer.items()}
                for precision, by_layer in fields.get("precisions", {}).items()
            }
        except (AttributeError, TypeError, ValueError):
            raise error("precisions", "must map precisions to exit layers to what was measured") from None
        return cls(
            exit_layers=tuple(layers),
            exit_head=cast("ExitHeadKind", fields["exit_head"]),
            default_depth=default_depth,
            thresholds={int(key): float(value) for key, value in thresholds.items()},
            tokenizer_id=tokenizer_id,
            training=training,
            precisions=precisions,
            weights_digest=weights_digest,
        )

    def has_own_head(self, exit_layer: int) -> bool:
        """Whether an exit has its own head. The last layer never does: it uses the model's final norm."""
        return self.exit_head != "shared" and exit_layer != self.num_layers

    def check_depth(self, depth: int, model: str) -> None:
        """Raises UnknownDepthError, naming the valid depths, unless `depth` is an exit layer."""
        if depth in self.exit_layers:
            return
        if len(self.exit_layers) == 1:
            raise UnknownDepthError(
                f"{model} has no early exits, so its only depth is {self.num_layers}, not {depth}; "
                "add exits with `helios models add-exits`"
            )
        depths = ", ".join(map(str, self.exit_layers))
        raise UnknownDepthError(f"{model} has no exit after layer {depth}; its depths are {depths}")

    def check_exits(self, exits: Sequence[int], depth: int, model: str) -> None:
        """Checks a depth and the exits to be read out up to it.

        Raises UnknownDepthError as `check_depth` does, ValueError for an exit beyond the depth.
        """
        for layer in (depth, *exits):
            self.check_depth(layer, model)
        if any(layer > depth for layer in exits):
            raise ValueError(f"exits {exits} reach beyond depth {depth}")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that can be loaded."""

    name: str
    path: Path
    config: ModelConfig
    facts: EarlyExitFacts
    tokenizer_id: str | None  # SHA-256 of tokenizer.json; None: it has the slow tokenizer files instead

    @property
    def num_layers(self) -> int:
        """Number of layers of the whole model."""
        return self.config.num_layers

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The depths at which it can be loaded."""
        return self.facts.exit_layers

    @property
    def has_exits(self) -> bool:
        """Whether it can be served at less than full depth."""
        return len(self.facts.exit_layers) > 1

    @property
    def default_depth(self) -> int:
        """The depth to load by default."""
        return self.facts.default_depth

    @property
    def parameters(self) -> int:
        """Parameters of the whole model without exit heads. Tied weights count once."""
        return self.config.parameters()

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and output together."""
        return self.config.context_tokens

    def within(self, context_tokens: int | None) -> "ModelEntry":
        """The model with a context of at most so many tokens. None: with its own context."""
        if context_tokens is None or context_tokens >= self.context_tokens:
            return self
        return replace(self, config=replace(self.config, context_tokens=context_tokens))


@dataclass(frozen=True, slots=True)
class BrokenModel:
    """A directory that cannot be loaded as a model, and the reason."""

    name: str
    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Catalog:
    """The contents of a models directory, by name."""

    models: tuple[ModelEntry, ...]
    broken: tuple[BrokenModel, ...]


def read_model(path: Path) -> ModelEntry:
    """The catalog's entry of a checkpoint directory, without reading its weights.

    Raises CheckpointError naming the file that is missing or wrong.
    """
    config = read_config(path)
    facts = EarlyExitFacts.read(path, config.num_layers)
    WeightMap.read(path)
    if facts.exit_head != "shared" and not (path / EXITS_FILE).is_file():
        raise CheckpointError(
            f"{path / EXITS_FILE} is missing though {FACTS_FILE} says that exits have heads; fetch it"
        )
    return ModelEntry(path.name, path, config, facts, _tokenizer_id(path))


def read_catalog(models_dir: Path) -> Catalog:
    """All models of a directory, and its subdirectories that cannot be loaded, with the reason.

    Raises SettingsError when the directory does not exist.
    """
    models, broken = [], []
    for path in _model_paths(models_dir):
        try:
            models.append(read_model(path))
        except CheckpointError as error:
            broken.append(BrokenModel(path.name, path, error.message))
    return Catalog(tuple(models), tuple(broken))


def list_models(models_dir: Path) -> list[ModelEntry]:
    """The loadable models of a directory, by name. Raises SettingsError when it does not exist."""
    return list(read_catalog(models_dir).models)


def find_model(models_dir: Path, name: str) -> ModelEntry:
    """The model of this name.

    Raises UnknownModelError naming the available ones, CheckpointError when the model is broken.
    """
    # The name is compared with existing names and never joined to a path, so it cannot point outside.
    paths = {path.name: path for path in _model_paths(models_dir)}
    if name not in paths:
        available = ", ".join(paths) or "none; fetch one with `helios models pull`"
        raise UnknownModelError(f"no model {name!r} in {models_dir}; available: {available}")
    return read_model(paths[name])


def find_models_dir(models_dir: Path | None = None) -> Path:
    """`models_dir` if given, else $HELIOS_MODELS_DIR, else ./models, else the models beside the package.

    Raises SettingsError when it does not exist.
    """
    chosen = models_dir or os.environ.get(MODELS_DIR_VARIABLE)
    beside = [Path("models").absolute(), models_beside_package()]
    candidates = [Path(chosen)] if chosen else beside
    for path in candidates:
        if path.is_dir():
            return path
    tried = " and ".join(map(str, candidates))
    raise SettingsError(
        f"no models directory at {tried}; name one with --models-dir or {MODELS_DIR_VARIABLE}"
    )


def models_beside_package() -> Path:
    """The models directory of this repository. It need not exist where Helios is installed without one."""
    return Path(helios.__file__).parent.parent / "models"


def checkpoint_id(entry: ModelEntry) -> str:
    """An id that changes whenever a file of the checkpoint changes. Reads no file.

    It is made from the files' path, names, sizes and times. It includes the inode change time, because
    copying tools preserve the modification time.
    """
    digest = hashlib.sha256(f"{entry.path.resolve()}\n".encode())
    for file in sorted(path for path in entry.path.iterdir() if path.is_file()):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _model_paths(models_dir: Path) -> list[Path]:
    try:
        paths = sorted(models_dir.iterdir())
    except OSError as error:
        raise SettingsError(
            f"the models directory {models_dir} cannot be read ({error.strerror}); choose another with "
            f"--models-dir or {MODELS_DIR_VARIABLE}"
        ) from error
    return [
        path for path in paths if path.is_dir() and path.name != EXITS_DIR and not path.name.startswith(".")
    ]


def _tokenizer_id(path: Path) -> str | None:
    file = path / TOKENIZER_FILE
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    if all((path / name).is_file() for name in SLOW_TOKENIZER_FILES):
        return None
    slow = " and ".join(SLOW_TOKENIZER_FILES)
    raise CheckpointError(f"{path} holds no tokenizer: neither {TOKENIZER_FILE} nor {slow}; fetch it")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_probability(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
