"""The JSON that the Hub speaks: its descriptions of files, refs and discussions, a commit's ndjson, card metadata."""

from __future__ import annotations

import base64
import importlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tests.hub.listener import RefusalError
from tests.hub.state import REGULAR_FILE_LIMIT, Blob, Change, Commit, Discussion, Repository


def timestamp(moment: datetime) -> str:
    """A point of time as the Hub writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def file_entry(path: str, blob: Blob) -> dict[str, object]:
    """A file in a tree listing."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.sha256 is not None:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": blob.pointer_size}
    if blob.xet_hash is not None:
        entry["xetHash"] = blob.xet_hash
    return entry


def sibling_details(blob: Blob) -> dict[str, object]:
    """What `blobs=true` adds to a file in a model's description."""
    details: dict[str, object] = {"size": len(blob.content), "blobId": blob.oid}
    if blob.sha256 is not None:
        details["lfs"] = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": blob.pointer_size}
    return details


def tree_entries(commit: Commit, prefix: str, recursive: bool) -> list[dict[str, object]]:
    """The files and folders below `prefix` (empty, or ending in a slash), of one level or all levels."""
    entries: dict[str, dict[str, object]] = {}
    for path, blob in commit.files.items():
        if not path.startswith(prefix):
            continue
        folders = path[len(prefix) :].split("/")[:-1]
        for depth in range(1, len(folders) + 1 if recursive else min(len(folders), 1) + 1):
            folder = prefix + "/".join(folders[:depth])
            entries.setdefault(folder, {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40})
        if recursive or not folders:
            entries[path] = file_entry(path, blob)
    return list(entries.values())


def ref_entries(prefix: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
    """Branches, tags or pull requests in a listing of refs."""
    return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]


def discussion_entry(repository: Repository, discussion: Discussion) -> dict[str, object]:
    """A discussion or pull request, as listed and as answered when it is opened."""
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "status": "open",
        "isPullRequest": discussion.is_pull_request,
        "createdAt": timestamp(discussion.created),
        "repo": {"name": repository.id, "type": "model"},
    }


def parse_change(repository: Repository, body: bytes, author: str) -> Change:
    """Read the ndjson of a commit: a header line, then one line for each operation.

    Raises:
        RefusalError: 400 for what is not such a body, a regular file that is too large, or a large file whose
            content was never uploaded.
    """
    try:
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = lines[0]["value"]
    except (ValueError, LookupError) as error:
        raise RefusalError(400, "Invalid commit payload") from error
    change = Change(header["summary"], header.get("description", ""), author, header.get("parentCommit"))
    for line in lines[1:]:
        kind, value = line["key"], line["value"]
        if kind == "deletedFile":
            change.deleted_files.append(value["path"])
        elif kind == "deletedFolder":
            change.deleted_folders.append(value["path"])
        elif kind == "file":
            change.added[value["path"]] = _regular_blob(value["path"], base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            change.added[value["path"]] = _large_blob(repository, value["path"], value["oid"])
        else:
            raise RefusalError(400, f"Invalid commit operation: {kind}")
    return change


def _regular_blob(path: str, content: bytes) -> Blob:
    if len(content) > REGULAR_FILE_LIMIT:
        raise RefusalError(400, f"Your push was rejected because {path} is larger than 10 MiB: use LFS for it.")
    return Blob.regular(content)


def _large_blob(repository: Repository, path: str, oid: str) -> Blob:
    blob = repository.objects.get(oid)
    if blob is None:
        sentence = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
        raise RefusalError(400, f"{sentence} Offending file: {path}")
    return blob


def card_metadata(commit: Commit) -> Any:
    """The YAML block of a commit's README.md in JSON's types; None where there is none or it cannot be read."""
    readme = commit.files.get("README.md")
    try:
        metadata = _front_matter(readme.content.decode()) if readme else None
    except ValueError:
        return None
    return json.loads(json.dumps(metadata, default=str))


def card_problem(content: str) -> str | None:
    """What the Hub would find wrong with a README's metadata; None where it would accept it.

    Checked are the two things that go wrong in practice: the YAML itself, and the form of `model-index`.
    """
    try:
        metadata = _front_matter(content)
    except ValueError as error:
        return f"Invalid YAML: {error}"
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        return "The metadata block must be a mapping"
    return _model_index_problem(metadata.get("model-index", []))


def _front_matter(content: str) -> Any:
    block = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    yaml = importlib.import_module("yaml")  # by name: it comes with huggingface_hub and has no type stubs here
    try:
        return yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _model_index_problem(index: Any) -> str | None:
    required = {"task": ["type"], "dataset": ["type", "name"]}
    try:
        for model in index:
            if not isinstance(model["name"], str):
                return '"model-index[].name" must be a string'
            for result in model["results"]:
                for part, keys in required.items():
                    for key in keys:
                        if not isinstance(result[part][key], str):
                            return f'"model-index[].results[].{part}.{key}" must be a string'
                for metric in result["metrics"]:
                    if "value" not in metric or not isinstance(metric["type"], str):
                        return '"model-index[].results[].metrics[]" must have a type and a value'
    except (TypeError, KeyError) as error:
        return f'"model-index" lacks {error}'
    return None
