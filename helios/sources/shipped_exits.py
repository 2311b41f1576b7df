"""Finds exits that ship without their model, by the digest of the model's weights."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from helios.architectures.spec import ModelConfig
from helios.catalog import (
    EXITS_DIR,
    EXITS_FILE,
    FACTS_FILE,
    EarlyExitFacts,
    ModelEntry,
    models_beside_package,
)
from helios.errors import CheckpointError
from helios.json_object import read_json_object
from helios.sources.progress import Progress
from helios.weight_map import read_safetensors_header
from helios.weights_digest import weights_digest

# The card lies beside the model's own, which is README.md.
CARD_FILE = "EXITS.md"


@dataclass(frozen=True, slots=True)
class ShippedExits:
    """A folder with helios.json, README.md and, unless the exits share the final norm, exits.safetensors.

    digest: of the model's weights.
    """

    path: Path
    digest: str
    facts: EarlyExitFacts

    def fit(self, config: ModelConfig) -> bool:
        """Whether a model of this form can have these exits. Reads no weights."""
        if self.facts.num_layers != config.num_layers:
            return False
        if self.facts.exit_head == "shared":
            return True
        hidden = {
            slot.shape
            for name, slot in read_safetensors_header(self.path / EXITS_FILE).items()
            if name.endswith(".norm.weight")
        }
        return hidden == {(config.hidden_size,)}


def list_exits(models_dir: Path) -> list[ShippedExits]:
    """All exits of a models directory and of the one beside the package.

    Raises CheckpointError naming the file that is missing or wrong.
    """
    found: list[ShippedExits] = []
    directories = models_dir, models_beside_package()
    for directory in dict.fromkeys(path.resolve() / EXITS_DIR for path in directories):
        if not directory.is_dir():
            continue
        for path in sorted(path for path in directory.iterdir() if (path / FACTS_FILE).is_file()):
            layers = read_json_object(path / FACTS_FILE).get("exit_layers")
            if not isinstance(layers, list) or not layers or not isinstance(layers[-1], int):
                raise CheckpointError(f"{path / FACTS_FILE}: exit_layers must end with the last layer")
            facts = EarlyExitFacts.read(path, layers[-1])
            if facts.weights_digest is None:
                raise CheckpointError(
                    f"{path / FACTS_FILE}: weights_digest is missing, by which the model is found"
                )
            found.append(ShippedExits(path, facts.weights_digest, facts))
    return found


def add_exits(entry: ModelEntry, models_dir: Path, progress: Progress) -> Path | None:
    """Puts the exits that ship for a model beside its weights. Returns where they came from, None if none do.

    A model with a helios.json of its own keeps it. The weights are read only if some exits have their form.
    """
    if (entry.path / FACTS_FILE).exists():
        return None
    fitting = [
        exits
        for exits in list_exits(models_dir)
        if exits.fit(entry.config) and exits.facts.tokenizer_id in (None, entry.tokenizer_id)
    ]
    if not fitting:
        return None
    digest = weights_digest(entry.path, lambda done, total: progress("digest of the weights", done, total))
    for exits in fitting:
        if exits.digest == digest:
            for name, placed in (
                (FACTS_FILE, FACTS_FILE),
                (EXITS_FILE, EXITS_FILE),
                ("README.md", CARD_FILE),
            ):
                if (exits.path / name).is_file():
                    shutil.copyfile(exits.path / name, entry.path / placed)
            return exits.path
    return None
