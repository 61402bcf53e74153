"""How the suite's model card lives with what people write on the Hub.

The suite's text stands between two marks and is made anew at each push. What a person writes outside of them stays,
and so does their metadata.
"""

from __future__ import annotations

import re
from typing import Any

_BEGIN = "<!-- charseq2seq begins: {repo_id} (this part is made anew at each push; write above or below it) -->"
_END = "<!-- charseq2seq ends -->"
_BLOCK = re.compile(r"<!-- charseq2seq begins: (?P<repo_id>\S*) [^\n]*-->.*?" + re.escape(_END), re.DOTALL)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

# What a person may choose differently on the website; ours is only the first proposal.
_PROPOSED = ("license", "language", "library_name", "pipeline_tag")


def marked(text: str, repo_id: str) -> str:
    """The suite's own text between its marks."""
    return f"{_BEGIN.format(repo_id=repo_id)}\n\n{text}\n\n{_END}"


def is_our_card(text: str) -> bool:
    """Whether a README.md bears the marks of this suite."""
    return _BLOCK.search(text) is not None


def retarget_card(text: str, repo_id: str) -> str:
    """Our card for another repository: it names `repo_id` where it named another."""
    block = _BLOCK.search(text)
    if block is None or block["repo_id"] == repo_id:
        return text
    old, new = block["repo_id"], repo_id
    text = re.sub(rf"(?<![\w./-]){re.escape(old)}(?![\w/-])", new, text)
    # The name alone: the title, and the model of the results in the metadata.
    alone = rf"^(# |- name: ){re.escape(old.partition('/')[2])}$"
    return re.sub(alone, rf"\g<1>{new.partition('/')[2]}", text, flags=re.MULTILINE)


def merge_cards(ours: str, theirs: str) -> str:
    """Our new card, with everything that people wrote into the published one.

    Text outside the marks stays as it is. Of the metadata, keys that we do not write stay; where a person chose
    another licence, language, library or pipeline, theirs stays; tags are united; results are ours, except for
    other models' ones. A card without marks (made on the website) keeps its text, below ours.
    """
    import yaml
    from huggingface_hub.utils import yaml_dump

    our_front, our_text = _split(ours)
    their_front, their_text = _split(theirs)
    block = _BLOCK.search(our_text)
    if block is None:  # a folder whose card a person rewrote: it is as they want it
        return ours
    if _BLOCK.search(their_text):
        text = _BLOCK.sub(lambda _: block[0], their_text, count=1)
    else:
        text = f"\n{block[0]}\n\n{their_text.strip()}\n" if their_text.strip() else our_text
    try:
        their_data = yaml.safe_load(their_front) or {}
    except yaml.YAMLError:
        their_data = None
    if not isinstance(their_data, dict):  # not metadata: nothing that could be kept
        return f"---\n{our_front}\n---\n{text}"
    merged = _merge_metadata(yaml.safe_load(our_front) or {}, their_data)
    # Unchanged metadata stays letter for letter, so that comments survive and nothing looks changed.
    front = their_front if merged == their_data else yaml_dump(merged, sort_keys=False).rstrip("\n")
    return f"---\n{front}\n---\n{text}"


def _merge_metadata(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = {**theirs, **ours}
    merged.update({key: theirs[key] for key in _PROPOSED if theirs.get(key)})
    their_tags = theirs.get("tags") or []
    their_tags = their_tags if isinstance(their_tags, list) else [their_tags]
    merged["tags"] = their_tags + [tag for tag in ours.get("tags", []) if tag not in their_tags]
    our_results = ours.get("model-index", [])
    our_names = [model["name"] for model in our_results]
    their_results = theirs.get("model-index")
    if isinstance(their_results, list):
        others = [one for one in their_results if isinstance(one, dict) and one.get("name") not in our_names]
        merged["model-index"] = our_results + others
    return merged


def _split(card: str) -> tuple[str, str]:
    """The YAML and the text of a card; no YAML is an empty one."""
    found = _FRONT_MATTER.match(card)
    return (found["yaml"], card[found.end() :]) if found else ("", card)
