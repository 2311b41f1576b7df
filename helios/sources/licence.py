"""The licence that a model card names."""

import re
from pathlib import Path

_CARD = "README.md"
_CARD_BYTES = 1 << 20
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


def licence_of_card(folder: Path) -> str | None:
    """The licence in the metadata at the head of a folder's README.md, None if there is none.

    Format: huggingface.co/docs/hub/model-cards. A licence that the hub does not know is `other`, with a name.
    """
    try:
        with (folder / _CARD).open(encoding="utf-8", errors="replace") as stream:
            front = _FRONT_MATTER.match(stream.read(_CARD_BYTES))
    except OSError:
        return None
    if front is None:
        return None
    fields = {
        key: value.strip().strip("\"'")
        for key, _, value in (line.partition(":") for line in front[1].splitlines())
        if key in ("license", "license_name")
    }
    licence = fields.get("license") or None
    return fields.get("license_name") or licence if licence == "other" else licence
