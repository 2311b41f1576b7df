"""Free texts to train on, out of Debian packages: fetched, cleaned, cut into documents and split.

`python -m training.corpora` downloads with `apt-get download` (no root, nothing installed, whatever mirror
the machine uses), unpacks with `dpkg-deb -x` and writes, per domain, `DOMAIN.train.jsonl` and
`DOMAIN.held.jsonl` (one object {"name", "text"} a line) plus `licences.json`.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from helios.errors import HeliosError, UnavailableError

DEFAULT_DIRECTORY = Path("~/.cache/helios/corpora").expanduser()

# Of every 50 documents in their natural order, the last two are held out: they are spread over the domain.
_HELD_PERIOD, _HELD_LAST = 50, 2
_APT_ATTEMPTS = 4


@dataclass(frozen=True)
class Document:
    """One chapter, page or manual: the unit that is held out or trained on as a whole."""

    name: str
    text: str


@dataclass(frozen=True)
class Domain:
    """A kind of text, the Debian packages that carry it, and its terms."""

    name: str
    packages: tuple[str, ...]
    title: str
    licence: str
    source: str
    read: Callable[[Path], Iterator[Document]]


def fetch_packages(packages: tuple[str, ...], directory: Path) -> Path:
    """Download and unpack Debian packages under `directory`; returns the root of the unpacked trees."""
    archives, root = directory / "debs", directory / "unpacked"
    archives.mkdir(parents=True, exist_ok=True)
    for package in packages:
        target = root / package
        if target.is_dir():
            continue
        if not list(archives.glob(f"{package}_*.deb")):
            _download(package, archives)
        archive = sorted(archives.glob(f"{package}_*.deb"))[-1]
        partial = root / f".{package}"
        partial.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
        partial.rename(target)
    return root


def _download(package: str, archives: Path) -> None:
    reason = ""
    for attempt in range(_APT_ATTEMPTS):
        done = subprocess.run(
            ["apt-get", "download", package], cwd=archives, check=False, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        reason = done.stderr.strip()
        if attempt == 0:  # package lists may be missing or old
            subprocess.run(["apt-get", "update"], check=False, capture_output=True)
        time.sleep(5 * attempt)  # another process may hold apt's lock
    raise UnavailableError(
        f"apt-get could not download {package}: {reason}. This needs a Debian 12 machine with package lists "
        f"(`apt-get update`), or put {package}_*.deb into {archives}."
    )


def is_held_out(index: int) -> bool:
    """Whether the document at `index` of its domain is kept for evaluation."""
    return index % _HELD_PERIOD >= _HELD_PERIOD - _HELD_LAST


def read_kjv(root: Path) -> Iterator[Document]:
    """The King James Bible: one document per chapter, one verse per line, without numbers."""
    program = root / "bible-kjv/usr/bin/bible"
    data = root / "bible-kjv-text/usr/lib"
    done = subprocess.run(
        # -f: one verse per line, "Ge1:1 In the beginning"
        [str(program), "-f", "-p", str(data), "gen1:1-rev22:21"],
        check=False,
        capture_output=True,
        text=True,
    )
    chapters: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        match = re.match(r"(\w+?)(\d+):\d+ (.*)", line)
        if match:
            chapters.setdefault(f"{match[1]} {match[2]}", []).append(match[3].strip())
    if len(chapters) != 1189:
        raise UnavailableError(
            f"bible(1) gave {len(chapters)} of 1189 chapters ({done.stderr.strip() or 'no error text'}); "
            "it needs libreadline8 on this machine"
        )
    for name, verses in chapters.items():
        yield Document(name, "\n".join(verses))


class _PageText(html.parser.HTMLParser):
    """The text of a DocBook page: separate paragraphs, code line by line, no navigation."""

    _PARAGRAPHS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "li", "pre", "dt", "dd", "div", "tr"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0
        self._stack: list[bool] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("img", "br", "hr", "meta", "link", "input", "col"):
            return
        kind = dict(attrs).get("class") or ""
        hides = tag in ("script", "style", "head", "table") or kind in ("docnav", "toc", "indexterm", "nav")
        self._stack.append(hides)
        self._hidden += hides
        self._pre += tag == "pre"
        if tag in self._PARAGRAPHS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self._stack and tag not in ("img", "br", "hr", "meta", "link", "input", "col"):
            self._hidden -= self._stack.pop()
            self._pre -= tag == "pre"
            if tag in self._PARAGRAPHS:
                self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def read_handbook(root: Path) -> Iterator[Document]:
    """The Debian Administrator's Handbook in English, one document per page."""
    pages = root / "debian-handbook/usr/share/doc/debian-handbook/html/en-US"
    for path in sorted(pages.glob("*.html")):
        if path.stem == "index":
            continue
        page = _PageText()
        page.feed(path.read_text(encoding="utf-8"))
        text = re.sub(
            r"^\s*(Download the ebook|Prev|Next|Up|Home)\s*$", "", "".join(page.parts), flags=re.MULTILINE
        )
        yield Document(path.stem, text.replace("The Debian Administrator's Handbook\n", "", 1))


def read_wordnet(root: Path) -> Iterator[Document]:
    """WordNet glosses, "words: definition", forty to a document."""
    for part in ("noun", "verb", "adj", "adv"):
        path = root / f"wordnet-base/usr/share/wordnet/data.{part}"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # skips the licence at the top
            fields, _, gloss = line.partition(" | ")
            columns = fields.split()
            words = [columns[4 + 2 * index].replace("_", " ") for index in range(int(columns[3], 16))]
            entries.append(f"{', '.join(words[:3])}: {gloss.strip()}")
        for start in range(0, len(entries), 40):
            yield Document(f"{part} {start}", "\n".join(entries[start : start + 40]))


_RST_DROPPED = re.compile(
    r"^(\s*)\.\. (index|contents|toctree|sectionauthor|moduleauthor|module|currentmodule|highlight|image"
    r"|figure|raw|only|testsetup|testcleanup|role|rubric|tabularcolumns|bibliographic|_|productionlist|include"
    r"|literalinclude|[Ss]ource|XXX|comment|\w+ comment)"
)
_RST_LABELS = {
    "note": "Note:", "warning": "Warning:", "seealso": "See also:", "tip": "Tip:", "caution": "Caution:",
    "versionadded": "New in version", "versionchanged": "Changed in version",
    "deprecated": "Deprecated since version", "deprecated-removed": "Deprecated since version",
    "impl-detail": "Implementation detail:",
}  # fmt: skip


def clean_rst(source: str) -> str:
    """Converts Sphinx's reStructuredText to plain text without markup, labels and comments."""
    lines: list[str] = []
    skipping: int | None = None  # indent of the directive whose body is being skipped
    for line in source.splitlines():
        indent = len(line) - len(line.lstrip())
        if skipping is not None and (not line.strip() or indent > skipping):
            continue
        skipping = None
        if _RST_DROPPED.match(line) or re.match(r"^\s*\.\.(\s+[^:]*)?$", line):
            skipping = indent
            continue
        if re.fullmatch(r"\s*([=\-~^\"'*+#`.:<>])\1{2,}\s*", line) or re.fullmatch(r"\s*=+( +=+)+\s*", line):
            continue  # heading underline, rule, table border
        if re.match(r"^\s+:(\w|-)+:(\s|$)", line):
            continue  # option of a directive
        directive = re.match(r"^(\s*)\.\. ([\w:.-]+):: ?(.*)$", line)
        if directive:
            label = _RST_LABELS.get(directive[2], "")
            lines.append(f"{directive[1]}{label} {directive[3]}" if label else directive[1] + directive[3])
        else:
            lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r":[\w:.+-]+:`[!~]?([^`<]*?)\s*(<[^`>]*>)?`", r"\1", text)  # :role:`text <target>`
    text = re.sub(r"`([^`<]+?)\s*<[^`>]+>`_{1,2}", r"\1", text)
    text = re.sub(r"``([^`]+)``", r"\1", text)
    text = re.sub(r"`([^`\n]+)`_?_?", r"\1", text)
    text = re.sub(r"\*\*([^*\n]+)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*([^*\s][^*\n]*)\*(?![\w*])", r"\1", text)
    text = re.sub(r"::[ ]*$", ":", text, flags=re.MULTILINE)
    return re.sub(r"\\([*_\\|])", r"\1", text)


def read_python(root: Path) -> Iterator[Document]:
    """Python's documentation from its reStructuredText sources, one document per page."""
    pages = root / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for path in sorted(pages.rglob("*.txt")):
        if path.name not in (
            "contents.rst.txt",
            "license.rst.txt",
        ):  # a list of links; licences of other projects
            yield Document(str(path.relative_to(pages)), clean_rst(path.read_text(encoding="utf-8")))


_ROFF_GLYPHS = {
    r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\(bu": "*", r"\(em": "--", r"\(en": "-", r"\(ha": "^",
    r"\(ti": "~", r"\(ga": "`", r"\(lq": '"', r"\(rq": '"', r"\(oq": "'", r"\(cq": "'", r"\(co": "(c)",
    r"\(bv": "|", r"\(<=": "<=", r"\(>=": ">=", r"\(mu": "x", r"\(mc": "u", r"\(->": "->", r"\(+-": "+-",
    r"\(rs": "\\", r"\e": "\\", r"\ ": " ", r"\~": " ", r"\0": " ", r"\'": "'", r"\`": "`", r"\.": ".",
}  # fmt: skip
_ROFF_GLYPH = re.compile("|".join(re.escape(glyph) for glyph in sorted(_ROFF_GLYPHS, key=len, reverse=True)))


def clean_roff(source: str) -> str:
    """Converts a man(7) page to plain text: joins paragraphs, keeps examples line by line, drops tables."""
    out: list[str] = []
    filled, skipping = True, False
    for raw in source.splitlines():
        line = re.sub(r'\\["#].*$', "", raw)
        if re.match(r"^[.']\s*(TS|ie|if|el|de|ig)\b", line):
            skipping = re.match(r"^[.']\s*(TS|de|ig)\b", line) is not None
            continue
        if skipping:
            skipping = not re.match(r"^\.(TE|\.)", line)
            continue
        macro = re.match(r"^[.']\s*([A-Za-z]*)\s*(.*)$", line)
        if macro is None:
            text = line
        else:
            name = macro[1]
            words = [
                a or b for a, b in re.findall(r'"((?:[^"]|"")*)"|(\S+)', macro[2].replace(r"\ ", "\x00"))
            ]
            if name in ("nf", "EX", "fi", "EE"):
                filled = name in ("fi", "EE")
                out.append("\n")
                continue
            if name in ("PP", "P", "LP", "TP", "IP", "SH", "SS", "TQ", "HP", "sp"):
                out.append("\n\n")
            if name in ("SH", "SS"):
                out.append(" ".join(words) + "\n")
                continue
            if name == "IP":
                text = words[0] if words else ""
            elif name in ("B", "I", "SM", "SB"):
                text = " ".join(words)
            elif name in ("BR", "IR", "RB", "RI", "BI", "IB"):
                text = "".join(words)
            elif name == "UR":
                text = words[0] if words else ""
            else:
                continue
            text = text.replace("\x00", " ")
        text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[+-]?\d|\\[&/,:%|^c]|\\\*\([lr]q", "", text)
        text = re.sub(r"\\\[(..)\]", r"\(\1", text)
        text = _ROFF_GLYPH.sub(lambda match: _ROFF_GLYPHS[match[0]], text)
        out.append(text + (" " if filled else "\n"))
    return re.sub(r" *\n *(?=\n)", "\n", "".join(out))


def read_man(root: Path) -> Iterator[Document]:
    """The Linux manual pages, one document per page."""
    paths = [path for package in ("manpages", "manpages-dev") for path in (root / package).rglob("man?/*.gz")]
    for path in sorted(paths, key=lambda path: path.name):
        if path.is_symlink():
            continue  # another name of a page that has been read
        source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        if not re.search(r"^\.so ", source, flags=re.MULTILINE):  # not a page that only includes another one
            yield Document(path.name.removesuffix(".gz"), clean_roff(source))


_POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}


def clean_pod(source: str) -> str:
    """Converts Perl's plain old documentation (POD) to plain text."""
    paragraphs: list[str] = []
    skipping = False
    for part in re.split(r"\n\s*\n", source):
        paragraph = part
        command = re.match(r"=(\w+)\s*(.*)", paragraph.strip(), flags=re.DOTALL)
        if command:
            if command[1] in ("begin", "for"):
                skipping = command[1] == "begin"
                continue
            if command[1] == "end":
                skipping = False
                continue
            if command[1] not in ("head1", "head2", "head3", "head4", "item"):
                continue
            paragraph = command[2]
        if skipping or not paragraph.strip():
            continue
        paragraphs.append(paragraph if paragraph[0] in " \t" else _plain_pod(" ".join(paragraph.split())))
    return "\n\n".join(paragraphs)


def _plain_pod(text: str) -> str:
    for _ in range(6):  # codes are nested, so the innermost is replaced first
        before = text
        text = re.sub(r"\b[XZ]<[^<>]*>", "", text)
        text = re.sub(r"\bL<(?:([^<>|]+)\|)?([^<>]*)>", lambda match: match[1] or match[2].strip("/"), text)
        text = re.sub(r"\bE<(\w+)>", lambda match: _POD_ESCAPES.get(match[1], ""), text)
        text = re.sub(r"\b[BCFIS]<<+ (.*?) >+>", r"\1", text)
        text = re.sub(r"\b[BCFIS]<([^<>]*)>", r"\1", text)
        if text == before:
            break
    return text


def read_perl(root: Path) -> Iterator[Document]:
    """Perl's manual, one document per POD file."""
    for path in sorted((root / "perl-doc/usr/share/perl").rglob("pod/*.pod")):
        if path.name not in ("perltoc.pod", "perluniprops.pod"):  # a list of headings; a table
            yield Document(path.name, clean_pod(path.read_text(encoding="utf-8", errors="replace")))


DOMAINS = (
    Domain(
        "kjv", ("bible-kjv", "bible-kjv-text"), "King James Bible",
        "public domain (1611)", "Chip Chapin's Bible Retrieval System", read_kjv,
    ),
    Domain(
        "handbook", ("debian-handbook",), "The Debian Administrator's Handbook",
        "GPL-2+ or CC-BY-SA-3.0", "https://debian-handbook.info", read_handbook,
    ),
    Domain(
        "wordnet", ("wordnet-base",), "WordNet 3.0 glosses",
        "WordNet 3.0 licence (Princeton University; permissive with notice)", "https://wordnet.princeton.edu",
        read_wordnet,
    ),
    Domain(
        "python", ("python3.11-doc",), "Python 3.11 documentation",
        "PSF-2.0 (examples also 0BSD)", "https://docs.python.org", read_python,
    ),
    Domain(
        "man", ("manpages", "manpages-dev"), "Linux man-pages 6.03",
        "per page: Linux-man-pages-copyleft (verbatim), GPL-2+, BSD, MIT", "https://www.kernel.org/doc/man-pages",
        read_man,
    ),
    Domain(
        "perl", ("perl-doc",), "Perl 5.36 manual",
        "Artistic or GPL-1+", "https://perldoc.perl.org", read_perl,
    ),
)  # fmt: skip


def tidy(text: str) -> str:
    """Unifies line ends, removes trailing blanks, and leaves at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\u00a0", " ").expandtabs(8)
    text = re.sub(r"[ ]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def write_domain(domain: Domain, root: Path, directory: Path) -> dict[str, object]:
    """Write the two files of a domain. Returns its record (licence terms and sizes)."""
    documents = [Document(document.name, tidy(document.text)) for document in domain.read(root)]
    documents = [document for document in documents if len(document.text) >= 200]
    if len(documents) < _HELD_PERIOD:
        raise UnavailableError(
            f"{domain.name}: only {len(documents)} documents found; the package's layout has changed"
        )
    record: dict[str, object] = {
        "name": domain.title, "packages": domain.packages, "licence": domain.licence, "source": domain.source,
    }  # fmt: skip
    for split in ("train", "held"):
        chosen = [doc for index, doc in enumerate(documents) if is_held_out(index) == (split == "held")]
        lines = [json.dumps(asdict(document), ensure_ascii=False) for document in chosen]
        (directory / f"{domain.name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        record[f"{split}_documents"] = len(chosen)
        record[f"{split}_bytes"] = sum(len(document.text.encode()) for document in chosen)
    return record


def read_documents(directory: Path, domain: str, split: str) -> list[Document]:
    """Documents of a domain's split ("train" or "held"), as `python -m training.corpora` wrote them."""
    path = directory / f"{domain}.{split}.jsonl"
    if not path.exists():
        raise UnavailableError(f"{path} does not exist: run `python -m training.corpora` first")
    with path.open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.corpora", description=__doc__)
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    licences = {}
    for domain in DOMAINS:
        root = fetch_packages(domain.packages, directory)
        record = write_domain(domain, root, directory)
        licences[domain.name] = record
        print(
            f"{domain.name:10} {record['train_documents']:>6} documents {record['train_bytes']:>10,} bytes "
            f"to train, {record['held_documents']:>4} documents {record['held_bytes']:>9,} bytes held out"
        )
    (directory / "licences.json").write_text(json.dumps(licences, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except HeliosError as error:
        raise SystemExit(f"error: {error}") from None
