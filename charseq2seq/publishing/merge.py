"""Two cards made one: the suite's part is made anew, and what people wrote on the Hub stays.

The metadata is split into its top-level entries and merged as text. So what people wrote stays letter for letter,
comments included. Values stay text too: PyYAML would make the language code `no` false.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from typing import Any

_MARK, _END = "<!-- charseq2seq begins: ", "<!-- charseq2seq ends -->"
_BLOCK = re.compile(rf"(?P<mark>{_MARK}[^\n]*-->)(?P<text>.*?){_END}", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(?P<yaml>(?:[^\n]*\n)*?)---[ \t]*(?:\n|\Z)")
_COMMENTS_BELOW = re.compile(r"(^[ \t]*(#.*)?\n)*\Z", re.MULTILINE)
_ENOUGH_LINES = 10  # a card without marks that has so many of our lines was ours


def is_our_card(text: str) -> bool:
    """Whether a README.md bears a mark of this suite."""
    return _MARK in text or _END in text


def seal(card: str) -> str:
    """Our card with a checksum of its text in the first mark, so that a later push sees whether somebody edited it."""
    block = _BLOCK.search(card)
    assert block is not None, "our card has its marks"
    mark = block["mark"].replace(" (", f" {_checksum(block['text'])} (", 1)
    return card.replace(block["mark"], mark)


def _checksum(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return hashlib.sha256(lines.encode(errors="replace")).hexdigest()[:16]


def merge_cards(ours: str, theirs: str) -> tuple[str, list[str]]:
    """Our new card with what people wrote into the published one, and a sentence for each thing of theirs that is lost.

    Text outside the marks stays; a card without marks (made on the website) keeps its text, below ours. Published
    metadata stays too. Our items are added to its lists, and our results replace earlier ones of this model.
    """
    import yaml

    our_front, our_text = _split(ours)
    byte_order_mark, line_end = "\ufeff" * theirs.startswith("\ufeff"), "\r\n" if "\r\n" in theirs else "\n"
    their_front, their_text = _split(theirs.removeprefix("\ufeff").replace("\r\n", "\n"))
    our_names = re.findall(rf"{_MARK}\S*?/(\S+)", ours + theirs)  # before and after a renaming
    try:
        front, lost = _merge_metadata(our_front, their_front, our_names)
    except yaml.YAMLError as error:
        front, lost = our_front, [f"the metadata is not YAML ({' '.join(str(error).split())}), so it is made anew"]
    text, lost_text = _merge_texts(our_text, their_text)
    return byte_order_mark + f"---\n{front}---\n{text}".replace("\n", line_end), lost + lost_text


def _split(card: str) -> tuple[str, str]:
    """The YAML and the text of a card; the YAML may be empty."""
    found = _FRONT_MATTER.match(card)
    return (found["yaml"], card[found.end() :]) if found else ("", card)


def _merge_texts(ours: str, theirs: str) -> tuple[str, list[str]]:
    block, published = _BLOCK.search(ours), _BLOCK.search(theirs)
    assert block is not None, "our card has its marks"
    if published is not None:
        was_edited = _checksum(published["text"]) not in published["mark"]
        lost = ["somebody edited the part between the marks, which is made anew"] if was_edited else []
        return theirs[: published.start()] + block[0] + theirs[published.end() :], lost
    # Where a mark was deleted, our part is from our first line to our last; short lines could be anybody's.
    known = {line.strip() for line in block[0].splitlines() if len(line) > 12 or line.startswith("# ")}
    lines = [line for line in re.finditer("[^\n]+", theirs) if line[0].strip() in known or is_our_card(line[0])]
    if not is_our_card(theirs) and len(lines) < _ENOUGH_LINES:
        return f"\n{block[0]}\n\n{theirs.strip()}".rstrip() + "\n", []
    lost = ["a mark was missing, so the part from our first line to our last is made anew"]
    return theirs[: lines[0].start()] + block[0] + theirs[lines[-1].end() :], lost


def _merge_metadata(ours: str, theirs: str, our_names: list[str]) -> tuple[str, list[str]]:
    entries, lost = _entries(theirs), []
    comments_above = theirs.removesuffix("".join(text for _, text in entries.values()))
    for name, (mine, our_text) in _entries(ours).items():
        node, text = entries.get(name, (None, ""))
        if node is None or node.tag.endswith(":null"):
            merged = our_text
        elif name == "model-index":
            models = [model for model in node.value if model.id == "mapping"] if node.id == "sequence" else []
            for model in models:
                if not any(key.value == "name" and value.value in our_names for key, value in model.value):
                    mine.value.append(model)  # the results of another model
            merged = text if _yaml(mine) == _yaml(node) else f"{name}:\n{_yaml(mine)}"
        else:
            merged = _with_items(name, mine, node, text)
        if merged != text:
            value = _COMMENTS_BELOW.sub("", text)
            lost += [f"comments in {name}"] if re.search(r"\s#", value) else []
            entries[name] = node, merged + text.removeprefix(value)
    return "".join([comments_above, *(text for _, text in entries.values())]), lost


def _entries(front: str) -> dict[str, tuple[Any, str]]:
    """The top-level entries: name -> PyYAML's node and the text, with the comments and empty lines below it."""
    import yaml

    root: Any = yaml.compose(front)
    pairs = [] if root is None else root.value
    if pairs and (root.id != "mapping" or root.flow_style or any(key.id != "scalar" for key, _ in pairs)):
        raise yaml.YAMLError("it is not of the form `name: value`, a line each")
    if len({key.value for key, _ in pairs}) < len(pairs):
        raise yaml.YAMLError("a name stands in it twice")
    begins = [key.start_mark.index for key, _ in pairs] + [len(front)]
    texts = [front[begin:end] for begin, end in itertools.pairwise(begins)]
    return {key.value: (value, text) for (key, value), text in zip(pairs, texts, strict=True)}


def _yaml(node: Any) -> str:
    import yaml

    return str(yaml.serialize(node, width=1 << 30, allow_unicode=True))


def _with_items(name: str, ours: Any, theirs: Any, text: str) -> str:
    """An entry of theirs, whose text this is, with those items of our list that it lacks."""
    if ours.id != "sequence":
        return text
    items = theirs.value if theirs.id == "sequence" else [theirs]
    words = [item.value for item in items if item.id == "scalar"]  # the Hub takes nothing else
    missing = [item.value for item in ours.value if item.value not in words]
    # In quotes, so that every reader of YAML takes `no` for a word.
    return f"{name}: {json.dumps(words + missing, ensure_ascii=False)}\n" if missing else text
