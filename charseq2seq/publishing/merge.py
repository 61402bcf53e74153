"""Two cards made one: the suite's part is made anew, and what people wrote on the Hub stays.

The metadata is edited as text, key by key. So what is not ours stays letter for letter, with its comments, and means
what the Hub reads in it: in YAML 1.2 `no` is a word, and for PyYAML it is false.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

_BEGIN = re.compile(r"<!-- charseq2seq begins: \S*(?P<seal> [0-9a-f]{16})? [^\n]*-->")
_END = "<!-- charseq2seq ends -->"
_BLOCK = re.compile(f"{_BEGIN.pattern}(?P<text>.*?){_END}\n*", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(?P<yaml>(?:[^\n]*\n)*?)---[ \t]*(?:\n|\Z)")
_PROPOSED = ("license", "language", "pipeline_tag")  # a person may choose others on the website
_ENOUGH_LINES = 10  # of ours, for a text without any mark to be ours


def is_our_card(text: str) -> bool:
    """Whether a README.md bears a mark of this suite."""
    return _BEGIN.search(text) is not None or _END in text


def seal(card: str) -> str:
    """Our card with a checksum of its text in the first mark, by which a later push sees that somebody edited it."""
    block = _BLOCK.search(card)
    assert block is not None, "our card has its marks"
    at = block.start() + block[0].index(" (")
    return f"{card[:at]} {_checksum(block['text'])}{card[at:]}"


def _checksum(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return hashlib.sha256(lines.encode(errors="replace")).hexdigest()[:16]


def merge_cards(ours: str, theirs: str) -> tuple[str, list[str]]:
    """Our new card with everything in it that people wrote into the published one.

    Text outside the marks stays. So do metadata that we do not write, and another licence, language or pipeline; tags
    and datasets are united; results are ours, except for other models' ones. A card without marks (made on the
    website) keeps its text, below ours.

    Returns:
        The card, and a sentence for each thing of theirs that it no longer holds.
    """
    mark, theirs = ("\ufeff", theirs[1:]) if theirs.startswith("\ufeff") else ("", theirs)
    line_end = "\r\n" if "\r\n" in theirs else "\n"
    our_front, our_text = _split(ours)
    their_front, their_text = _split(theirs.replace("\r\n", "\n"))
    our_names = re.findall(r"<!-- charseq2seq begins: \S*?/(\S+)", ours + theirs)  # before and after a renaming
    front, lost = _merge_metadata(our_front, their_front, our_names)
    text, lost_text = _merge_texts(our_text, their_text)
    card = f"{mark}---\n{front}---\n{text}"
    return card.replace("\n", line_end), lost + lost_text


def _split(card: str) -> tuple[str, str]:
    """The YAML and the text of a card; no YAML is an empty one."""
    found = _FRONT_MATTER.match(card)
    return (found["yaml"], card[found.end() :]) if found else ("", card)


# --- the text


def _merge_texts(ours: str, theirs: str) -> tuple[str, list[str]]:
    block = _BLOCK.search(ours)
    assert block is not None, "our card has its marks"
    begin, end, lost = _find_block(block[0], theirs)
    if begin == end:
        return (f"\n{block[0].strip()}\n\n{theirs.strip()}\n" if theirs.strip() else ours), lost
    # An earlier version wrote the card twice where a mark was missing.
    rest = _BLOCK.sub("", theirs[end:])
    return theirs[:begin] + block[0].rstrip() + rest, lost


def _find_block(block: str, text: str) -> tuple[int, int, list[str]]:
    """Where our part of a published text begins and ends, and what is lost with it.

    Where a mark was deleted, that is where the first or last line stands that our part has too.
    """
    known = {line.strip() for line in block.splitlines() if len(line) > 12 or line.startswith("# ")}
    begin, end = _BEGIN.search(text), text.find(_END)
    if whole := _BLOCK.search(text):
        was_edited = whole["seal"] and whole["seal"].strip() != _checksum(whole["text"])
        lost = ["somebody edited the part between the marks, which is made anew"] if was_edited else []
        return whole.start(), whole.start() + len(whole[0].rstrip()), lost
    ours = [line.span() for line in re.finditer("[^\n]+", text) if line[0].strip() in known]
    if begin is not None:
        first, last = begin.start(), max([begin.end(), *(stop for _, stop in ours)])
    elif end >= 0:
        first, last = min([end, *(start for start, _ in ours)]), end + len(_END)
    elif len(ours) >= _ENOUGH_LINES:
        first, last = ours[0][0], ours[-1][1]
    else:
        return 0, 0, []
    return first, last, ["a mark was missing, so the part from our first line to our last is made anew"]


# --- the metadata, as nodes of YAML: what was written and where, not what PyYAML would make of it


def _merge_metadata(ours: str, theirs: str, our_names: list[str]) -> tuple[str, list[str]]:
    import yaml

    compose: Callable[[str], Any] = yaml.compose
    try:
        root = compose(theirs)
        if root is not None and root.flow_style:  # {a: 1}: there are no lines to be edited
            root.flow_style = False
            theirs = _yaml(root)
            root = compose(theirs)
    except yaml.YAMLError as error:
        return ours, [f"the metadata is not YAML ({' '.join(str(error).split())}), so it is made anew"]
    if root is None:
        return theirs + ours, []
    if not isinstance(root, yaml.MappingNode):
        return ours, ["the metadata is not of the form `name: value`, so it is made anew"]
    pairs = {key.value: (key, value) for key, value in root.value if key.id == "scalar"}
    edits, added, lost = [], [], []
    for key, value in compose(ours).value:
        if key.value not in pairs:
            added.append((key, value))
        elif key.value == "model-index":
            begin, end = _lines(theirs, *pairs["model-index"])
            value.value += _others(pairs["model-index"][1], our_names)
            if _yaml(value) != _yaml(pairs["model-index"][1]):
                edits.append((begin, end, f"model-index:\n{_yaml(value)}"))
                lost += ["comments among the results"] if re.search(r"\s#", theirs[begin:end]) else []
        elif key.value not in _PROPOSED or _is_empty(pairs[key.value][1]):
            edits += _unite(theirs, pairs[key.value][1], value)
    if "library_name" in pairs and pairs["library_name"][1].value == "pytorch":  # ours, of an earlier version
        edits.append((*_lines(theirs, *pairs["library_name"]), ""))
    for begin, end, text in sorted(edits, reverse=True):
        theirs = theirs[:begin] + text + theirs[end:]
    root.value = added
    return theirs + (_yaml(root) if added else ""), lost


def _yaml(node: Any) -> str:
    import yaml

    return str(yaml.serialize(node, width=1 << 30, allow_unicode=True))


def _is_empty(node: Any) -> bool:
    return node.id == "scalar" and node.value in ("", "~", "null") and not node.style


def _lines(text: str, key: Any, value: Any) -> tuple[int, int]:
    """From where to where a name and its value stand, whole lines, without what comes after them."""
    while value.id != "scalar" and not value.flow_style:
        value = value.value[-1][1] if value.id == "mapping" else value.value[-1]
    stop = len(text[: value.end_mark.index].rstrip())
    return key.start_mark.index, text.index("\n", stop) + 1


def _others(node: Any, our_names: list[str]) -> list[Any]:
    """The entries of a model-index that are not ours."""
    models = [model for model in node.value if model.id == "mapping"] if node.id == "sequence" else []
    return [m for m in models if not any(k.value == "name" and v.value in our_names for k, v in m.value)]


def _unite(text: str, theirs: Any, ours: Any) -> list[tuple[int, int, str]]:
    """The edit that puts into a value of theirs what ours has besides."""
    begin, end = theirs.start_mark.index, theirs.end_mark.index
    mine = [item.value for item in ours.value] if isinstance(ours.value, list) else [ours.value]
    if _is_empty(theirs):
        return [(begin, end, f" [{', '.join(mine)}]" if isinstance(ours.value, list) else f" {mine[0]}")]
    if theirs.id == "mapping":  # no list, and nothing that the Hub takes
        return []
    items = theirs.value if theirs.id == "sequence" else [theirs]
    mine = [one for one in mine if one not in [item.value for item in items]]
    if not mine:
        return []
    if items == [theirs]:  # `tags: mine`
        return [(begin, end, f"[{', '.join([json.dumps(theirs.value, ensure_ascii=False), *mine])}]")]
    if theirs.flow_style:
        at = items[-1].end_mark.index if items else begin + 1
        return [(at, at, ", ".join(["", *mine] if items else mine))]
    _, at = _lines(text, theirs, theirs)
    return [(at, at, "".join(f"{' ' * theirs.start_mark.column}- {one}\n" for one in mine))]
