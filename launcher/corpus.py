"""Text, tokenizer and batches for the training job, without a download.

The default text is the Python interpreter that runs this file: the source of its standard library, and the language
reference that ``help()`` shows. ``--text`` takes the user's own files instead. A byte-level BPE tokenizer is trained on
the training part, the text is encoded once, and both are cached under a key made of the text itself, so that a changed
text can never meet an old tokenizer.

Not for large corpora: the whole text is read into memory.
"""

import hashlib
import importlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_FRACTION = 20  # one document in twenty
FORMAT = 1  # goes up when the cached files change their meaning

# Tests are as large as everything else together and many distributions leave them out; the encodings are tables of
# characters. Without both, the text is the same on every build of one interpreter version.
_SKIPPED_DIRECTORIES = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"})


class TextError(ValueError):
    """The text cannot be trained on; the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class Document:
    """One file of text; ``name`` does not depend on where the text lies on this machine."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Encoded text.

    Attributes:
        train: token ids of all training documents, 1-D, uint16 or uint32, read from disk as needed.
        held_out: token ids of the documents that are never trained on.
        directory: where these files and ``tokenizer.json`` are cached.
        about: what the text is, for the log.
    """

    train: np.ndarray
    held_out: np.ndarray
    directory: Path
    about: str

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))


# ------------------------------------------------------------------------------------------------------------ the text


def interpreter_documents() -> list[Document]:
    """The running interpreter's standard library (.py files) and language reference, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_DIRECTORIES.intersection(relative.parts) or relative.parts[0] == "pydoc_data":
            continue
        text = _decode(path)
        if text:
            documents.append(Document(f"stdlib/{relative.as_posix()}", text))
    try:
        # As a module its text is one long string literal per topic; read it as people see it.
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    documents += [Document(f"reference/{name}", text) for name, text in sorted(topics.items()) if text.strip()]
    return documents


def user_documents(paths: Iterable[Path]) -> list[Document]:
    """The user's files; of a directory, every visible file below it that is UTF-8 text.

    Raises:
        TextError: a path does not exist, or a file that was named is not text. All such paths are listed.
    """
    documents: list[Document] = []
    problems: list[str] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
            texts = ((f"{path.name}/{p.relative_to(path).as_posix()}", _decode(p)) for p in inside)
            documents += [Document(name, text) for name, text in texts if text]
        elif path.is_file():
            text = _decode(path)
            if text:
                documents.append(Document(path.name, text))
            else:
                problems.append(f"{path}: empty, or not UTF-8 text")
        else:
            problems.append(f"{path}: no such file or directory")
    if problems:
        raise TextError("--text: " + "; ".join(problems))
    if not documents:
        raise TextError(f"--text: no UTF-8 text below {', '.join(map(str, paths))}")
    return documents


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents. By file, and by a hash of the name, so that adding a file moves no other.

    Where there are too few files for that, the last twentieth of each document is held out instead.
    """
    held_out = [d for d in documents if _hash(d.name.encode()) % HELD_OUT_FRACTION == 0]
    train = [d for d in documents if _hash(d.name.encode()) % HELD_OUT_FRACTION != 0]
    enough = sum(len(d.text) for d in held_out) * 2 * HELD_OUT_FRACTION > sum(len(d.text) for d in documents)
    if train and enough and len(documents) >= HELD_OUT_FRACTION:
        return train, held_out
    cuts = [(d, len(d.text) - len(d.text) // HELD_OUT_FRACTION) for d in documents]
    return [Document(d.name, d.text[:cut]) for d, cut in cuts], [Document(d.name, d.text[cut:]) for d, cut in cuts]


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _decode(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if "\0" in text else text


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


# ------------------------------------------------------------------------------------------------- tokenizer and cache


def prepare(
    text: Sequence[Path] | None, vocab_size: int, cache: Path, announce: Callable[[str], object] = lambda _: None
) -> Path:
    """Directory with ``tokenizer.json``, ``train.npy``, ``held_out.npy`` and ``about.json``; made if it is not there.

    Args:
        text: the user's files and directories, or None for the interpreter's own text.
        vocab_size: tokens of the BPE vocabulary, at least 257 (one per byte, and the end of a text).
        cache: the directory that holds the caches of all texts.
        announce: called with a sentence before anything that takes a while.

    Raises:
        TextError: see `user_documents`; also a vocabulary smaller than the bytes.
    """
    if vocab_size < 257:
        raise TextError(f"a byte-level vocabulary needs 257 tokens or more, and the model's vocab_size is {vocab_size}")
    documents = interpreter_documents() if text is None else user_documents(text)
    directory = cache / _key(documents, vocab_size)
    if (directory / "about.json").exists():
        return directory
    megabytes = sum(len(d.text) for d in documents) / 1e6
    announce(f"Training a {vocab_size}-token BPE tokenizer on {megabytes:.1f} MB of text (once; kept in {cache}) ...")
    cache.mkdir(parents=True, exist_ok=True)
    # Made aside and moved into place: a process that is killed here, or a second job, never leaves half a cache.
    making = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    try:
        _make(documents, vocab_size, making)
        try:
            os.replace(making, directory)
        except OSError:
            if not (directory / "about.json").exists():  # another job made the same cache in the meantime: use that
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return directory


def load(directory: Path) -> Corpus:
    """Opens what `prepare` made."""
    about: str = json.loads((directory / "about.json").read_text())["about"]
    train, held_out = (np.load(directory / f"{part}.npy", mmap_mode="r") for part in ("train", "held_out"))
    return Corpus(train, held_out, directory, about)


def fingerprint(directory: Path) -> str:
    """Hash of the tokenizer and the token ids: equal on every node, or the nodes would train on different text."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "train.npy", "held_out.npy"):
        digest.update((directory / name).read_bytes())
    return digest.hexdigest()


def _key(documents: Sequence[Document], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {vocab_size} {tokenizers.__version__}".encode())
    for document in documents:
        for part in (document.name, document.text):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def _make(documents: Sequence[Document], vocab_size: int, directory: Path) -> None:
    train, held_out = split(documents)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in train), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    counts = {}
    for name, part in (("train", train), ("held_out", held_out)):
        encoded = (e.ids for batch in _batches(part, 64) for e in tokenizer.encode_batch([d.text for d in batch]))
        ids = np.fromiter((i for document in encoded for i in (*document, end)), dtype=dtype)
        np.save(directory / f"{name}.npy", ids)
        counts[name] = len(ids)
    about = (
        f"{len(documents)} documents, {sum(len(d.text) for d in documents) / 1e6:.1f} M characters; "
        f"{counts['train'] / 1e6:.2f} M tokens to train on, {counts['held_out'] / 1e6:.2f} M held out"
    )
    (directory / "about.json").write_text(json.dumps({"about": about, "vocab_size": vocab_size, **counts}))


def _batches(documents: Sequence[Document], size: int) -> Iterator[Sequence[Document]]:
    return (documents[i : i + size] for i in range(0, len(documents), size))


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows of one length in an order that depends on nothing but the seed.

    A batch is a pure function of its number: whoever resumes at step 200 sees what an uninterrupted run would have
    seen, and the sequences of a global batch are the same however many ranks share them.
    """

    tokens: np.ndarray
    length: int
    seed: int

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def global_batch(self, number: int, size: int) -> np.ndarray:
        """Sequences ``(size, length)``, int64, of batch ``number``; every epoch visits the windows in a new order."""
        return self.sequences(number * size, size)

    def sequences(self, start: int, size: int) -> np.ndarray:
        """Sequences ``(size, length)``, int64, after the first ``start`` of the run."""
        return np.stack([self._window(i) for i in self._numbers(start, size)]).astype(np.int64)

    def _numbers(self, start: int, size: int) -> list[int]:
        numbers: list[int] = []
        while len(numbers) < size:
            epoch, offset = divmod(start + len(numbers), len(self))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
            numbers += order[offset : offset + size - len(numbers)].tolist()
        return numbers

    def _window(self, number: int) -> np.ndarray:
        return self.tokens[number * self.length : (number + 1) * self.length]
