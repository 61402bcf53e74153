"""Nothing secret leaves: the folder is searched for tokens and for paths of this machine before it is sent."""

from __future__ import annotations

import re
from pathlib import Path

from charseq2seq.publishing.failures import PublishError

# The shapes that the services themselves document; long enough not to be ordinary words.
_TOKEN = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[\w.-]{30,}|api_org_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}"
    rb"|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|xox[abp]-[A-Za-z0-9-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_HOME = re.compile(rb"(?:/home|/Users|C:\\+Users)[/\\]+[\w.-]+|/root/[\w.-]+")
_SHORTEST_PATH = 6  # "/" or "/root" would be found in ordinary text
_SUITE = Path(__file__).resolve().parents[2]


def scan_folder(folder: Path, names: list[str], token: str | None) -> None:
    """Search the files that are to be published.

    Args:
        token: the very token in use, if one is; searched for in every file, weights included.

    Raises:
        PublishError: something was found; the message says where, and never shows it.
    """
    paths = [str(path).encode() for path in (Path.home(), Path.cwd(), _SUITE) if len(str(path)) >= _SHORTEST_PATH]
    # Not the middle of another path or of an address: a folder may be called as the repository is.
    machine = re.compile(rb"(?<![\w.-])(?:" + b"|".join(map(re.escape, paths)) + rb")(?![\w-])") if paths else _HOME
    found = []
    for name in names:
        content = (folder / name).read_bytes()
        if token and token.encode() in content:
            found.append(f"the token in use, in {name}")
        if name.endswith((".bin", ".safetensors", ".png")):  # random bytes look like anything
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            if _TOKEN.search(line):
                found.append(f"what looks like a token, in {name} line {number}")
            elif _HOME.search(line) or machine.search(line):
                found.append(f"a path of a machine, in {name} line {number}")
    if found:
        raise PublishError("secret", "; ".join(found[:5]))
