"""The Hub on loopback is believed only as far as the real client, in a fresh process, finds it to be a Hub."""

from __future__ import annotations

import hashlib
import random
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.hub.client import LFS_ONLY, ONE_REPO, READ, STRANGER, WHOLE_ORG, WRITE, hub_with_people, run_client
from tests.hub.server import HubServer

UPLOAD = """
api.create_repo("alice/m", private=True)
folder = sorted(os.listdir("model"))
operations = lambda: [Add("nested/" + name if name == "a.txt" else name, "model/" + name) for name in folder]
first = api.create_commit("alice/m", operations(), commit_message="first push", commit_description="why")
again = api.create_commit("alice/m", operations(), commit_message="the same again")
result = {"first": first.oid, "again": again.oid}
"""
DOWNLOAD = """
folder = snapshot_download("alice/m")
check = api.verify_repo_checksums("alice/m")
info = api.model_info("alice/m", files_metadata=True)
hf_hub_download("alice/m", "pytorch_model.bin", local_dir="single")
result = {"folder": folder, "checked": check.checked_count, "bad": check.mismatches + check.missing_paths,
          "siblings": {one.rfilename: [one.size, one.lfs and one.lfs.sha256] for one in info.siblings},
          "license": info.card_data.license}
"""


def write_model(folder: Path) -> dict[str, bytes]:
    """A small model folder: text, weights with a stretch that repeats, and a picture; path -> content."""
    noise = random.Random(0).randbytes(900_000)
    files = {
        "README.md": b"---\nlicense: apache-2.0\ntags: [text2text-generation]\n---\n# m\n",
        "config.json": b'{"d_model": 64}',
        "nested/a.txt": "Grüße, 世界\n".encode(),
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + noise[:100],
        "pytorch_model.bin": noise + bytes(300_000) + noise,
    }
    folder.mkdir(parents=True)
    for path, content in files.items():
        (folder / Path(path).name).write_bytes(content)
    return files


@pytest.mark.parametrize(
    ("server_options", "environment", "upload_requests"),
    [
        pytest.param({}, LFS_ONLY, [("PUT", r"^/lfs/alice/m/[0-9a-f]{64}$")] * 2, id="lfs-basic"),
        pytest.param({"lfs_part_size": 500_000}, LFS_ONLY, [("PUT", r"/[1-5]$")] * 5, id="lfs-multipart"),
        pytest.param({}, {}, [("POST", "/v1/xorbs/"), ("POST", "/v1/shards")], id="xet"),
        pytest.param({"tls": True}, {}, [("POST", "/v1/xorbs/")], id="xet-over-tls"),
    ],
)
def test_what_is_pushed_comes_back_byte_for_byte_and_is_pushed_once(
    tmp_path: Path, server_options: dict[str, Any], environment: dict[str, str], upload_requests: list[tuple[str, str]]
) -> None:
    files = write_model(tmp_path / "writer" / "model")
    with hub_with_people(**server_options) as hub:
        pushed = run_client(hub, tmp_path / "writer", UPLOAD, **environment)
        for method, path in upload_requests:
            assert len(hub.calls(method, path)) >= upload_requests.count((method, path))
        read = run_client(hub, tmp_path / "reader", DOWNLOAD, READ, **environment)
        repository = hub.repo("alice/m")
        assert repository.private
        assert [(one.title, one.description) for one in repository.commits] == [
            ("first push", "why"),
            ("initial commit", ""),
        ]
        assert pushed["first"] == pushed["again"] == repository.head
        assert {path: content for path, content in repository.files().items() if path in files} == files
        storage_requests = [one for one in hub.requests if one.listener == "storage"]
        assert storage_requests and all(one.token is None for one in storage_requests)

    downloaded = Path(read["folder"])
    assert {path: (downloaded / path).read_bytes() for path in files} == files
    assert (tmp_path / "reader" / "single" / "pytorch_model.bin").read_bytes() == files["pytorch_model.bin"]
    assert (read["checked"], read["bad"], read["license"]) == (len(files) + 1, [], "apache-2.0")
    for path, content in files.items():
        large = path in ("picture.png", "pytorch_model.bin")
        assert read["siblings"][path] == [len(content), hashlib.sha256(content).hexdigest() if large else None]


def test_tokens_open_what_they_are_for_and_nothing_else(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("alice/m", {"config.json": b"{}"}, private=True)
    hub.add_repo("alice/open", {"config.json": b"{}"})
    script = f"""
probe = lambda repo, token, **options: refusal(
    lambda: api.preupload_lfs_files(repo, [Add("README.md", b"x")], token=token, **options))
READ, STRANGER, ONE_REPO, WHOLE_ORG = {[READ, STRANGER, ONE_REPO, WHOLE_ORG]}
result = {{
    "writer": probe("alice/m", None),
    "reader": probe("alice/m", READ),
    "stranger": probe("alice/open", STRANGER),
    "stranger proposes": probe("alice/open", STRANGER, create_pr=True),
    "fine-grained": probe("alice/m", ONE_REPO),
    "fine-grained elsewhere": probe("alice/open", ONE_REPO),
    "private unseen": refusal(lambda: api.model_info("alice/m", token=STRANGER)),
    "private, anonymous": refusal(lambda: api.model_info("alice/m", token=False)),
    "private, narrow token": refusal(lambda: api.model_info("alice/m", token=WHOLE_ORG)),
    "unknown token": refusal(lambda: api.model_info("alice/m", token="hf_nobody")),
    "whoami unknown": refusal(lambda: api.whoami("hf_nobody")),
    "exists": refusal(lambda: api.create_repo("alice/m")),
    "exists, tolerated": refusal(lambda: api.create_repo("alice/m", exist_ok=True)),
    "reader, exists, tolerated": refusal(lambda: api.create_repo("alice/m", exist_ok=True, token=READ)),
    "reader creates": refusal(lambda: api.create_repo("alice/new", token=READ)),
    "foreign namespace": refusal(lambda: api.create_repo("mallory/new")),
    "organisation": refusal(lambda: api.create_repo("acme/new")),
    "organisation, reading": refusal(lambda: api.create_repo("museum/new")),
    "fine-grained organisation": refusal(lambda: api.create_repo("acme/other", token=WHOLE_ORG)),
    "fine-grained, wrong place": refusal(lambda: api.create_repo("alice/other", token=WHOLE_ORG)),
    "me": api.whoami(), "me, fine-grained": api.whoami(WHOLE_ORG)["auth"]["accessToken"],
}}
"""
    result = run_client(hub, tmp_path, script)
    allowed = ["writer", "stranger proposes", "fine-grained", "exists, tolerated", "reader, exists, tolerated"]
    assert [name for name in allowed if result.pop(name) is not None] == []
    assert [result.pop(name) for name in ("organisation", "fine-grained organisation")] == [None, None]

    me, fine_grained = result.pop("me"), result.pop("me, fine-grained")
    assert (me["name"], me["auth"]["accessToken"]["role"]) == ("alice", "write")
    assert {org["name"]: org["roleInOrg"] for org in me["orgs"]} == {"acme": "write", "museum": "read"}
    assert fine_grained["role"] == "fineGrained"
    assert fine_grained["fineGrained"]["scoped"] == [
        {"entity": {"type": "org", "name": "acme"}, "permissions": ["repo.content.read", "repo.write"]}
    ]

    no_namespace = "You don't have the rights to create a model under the namespace"
    assert {name: (one["status"], one["class"]) for name, one in result.items()} == {
        "reader": (403, "HfHubHTTPError"),
        "stranger": (403, "HfHubHTTPError"),
        "fine-grained elsewhere": (403, "HfHubHTTPError"),
        "private unseen": (404, "RepositoryNotFoundError"),
        "private, anonymous": (401, "HfHubHTTPError"),
        "private, narrow token": (404, "RepositoryNotFoundError"),
        "unknown token": (401, "HfHubHTTPError"),
        "whoami unknown": (401, "HfHubHTTPError"),
        "exists": (409, "HfHubHTTPError"),
        "reader creates": (403, "HfHubHTTPError"),
        "foreign namespace": (403, "HfHubHTTPError"),
        "organisation, reading": (403, "HfHubHTTPError"),
        "fine-grained, wrong place": (403, "HfHubHTTPError"),
    }
    assert result["reader"]["message"] == "you must use a write token to upload to a repository."
    assert result["stranger"]["message"].startswith("pass `create_pr=1` as a query parameter")
    assert "not the required permissions" in result["fine-grained elsewhere"]["message"]
    assert result["unknown token"]["message"] == "Invalid credentials in Authorization header"
    assert result["whoami unknown"]["text"].startswith("Invalid user token.")
    assert result["exists"]["message"] == "You already created this model repo"
    assert result["foreign namespace"]["message"] == f'{no_namespace} "mallory"'
    assert sorted(hub.repos) == ["acme/new", "acme/other", "alice/m", "alice/open"]


def test_over_tls_a_private_repository_is_not_found_instead_of_unauthorized(tmp_path: Path) -> None:
    with hub_with_people(tls=True) as hub:
        hub.add_repo("alice/m", private=True)
        script = 'result = refusal(lambda: api.model_info("alice/m", token=False))'
        trusted = run_client(hub, tmp_path / "trusted", script)
        distrusted = run_client(hub, tmp_path / "distrusted", script, SSL_CERT_FILE="")
    assert (trusted["status"], trusted["class"]) == (401, "RepositoryNotFoundError")
    assert distrusted["class"] == "ConnectError" and "CERTIFICATE_VERIFY_FAILED" in distrusted["text"]


def test_commits_change_delete_and_refuse_as_a_whole(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.add_repo("alice/m", {"old.txt": b"old", "gone/a.txt": b"a", "gone/b/c.txt": b"c"})
    base = repository.head
    script = f"""
base = {base!r}
delete = lambda *operations: api.create_commit("alice/m", list(operations), commit_message="delete")
delete(Add("new.txt", b"new"), Delete("old.txt"), Delete("gone/"))
result = {{
    "stale parent": refusal(lambda: commit("alice/m", {{"x.txt": "x"}}, parent_commit=base)),
    "nothing to delete": refusal(lambda: delete(Add("y.txt", b"y"), Delete("old.txt"))),
    "no such branch": refusal(lambda: commit("alice/m", {{"z.txt": "z"}}, revision="nowhere")),
    "no such file": refusal(lambda: hf_hub_download("alice/m", "z.txt")),
    "no such repository": refusal(lambda: api.model_info("alice/nothing")),
    "card": refusal(lambda: commit("alice/m", {{"README.md": "---\\nlicense: [mit\\n---\\n"}})),
    "model-index": refusal(lambda: commit("alice/m", {{"README.md": "---\\nmodel-index: [{{name: m}}]\\n---\\n"}})),
    "at the old commit": sorted(api.list_repo_files("alice/m", revision=base[:10])),
}}
from huggingface_hub.utils import get_session
never = '{{"path": "w.bin", "algo": "sha256", "oid": "' + "0" * 64 + '", "size": 1}}'
lines = '{{"key": "header", "value": {{"summary": "s"}}}}\\n{{"key": "lfsFile", "value": ' + never + '}}\\n'
answer = get_session().post(api.endpoint + "/api/models/alice/m/commit/main", content=lines,
                            headers=api._build_hf_headers())
result["never uploaded"] = [answer.status_code, answer.headers["X-Error-Message"]]
"""
    result = run_client(hub, tmp_path, script)
    assert set(repository.files()) == {".gitattributes", "new.txt"}
    assert len(repository.commits) == 3
    assert result.pop("at the old commit") == [".gitattributes", "gone/a.txt", "gone/b/c.txt", "old.txt"]
    status, message = result.pop("never uploaded")
    assert status == 400 and "LFS pointer pointed to a file that does not exist" in message
    assert {name: (one["status"], one["class"]) for name, one in result.items()} == {
        "stale parent": (412, "HfHubHTTPError"),
        "nothing to delete": (404, "RemoteEntryNotFoundError"),
        "no such branch": (404, "RevisionNotFoundError"),
        "no such file": (404, "RemoteEntryNotFoundError"),
        "no such repository": (404, "RepositoryNotFoundError"),
        "card": (None, "ValueError"),
        "model-index": (None, "ValueError"),
    }
    assert result["stale parent"]["message"] == "A commit has happened since. Please refresh and try again."
    assert "results" in result["model-index"]["text"]


def test_pull_requests_tags_branches_and_visibility(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.add_repo("alice/m", {"config.json": b"{}"})
    main = repository.head
    script = f"""
proposed = commit("alice/m", {{"fix.txt": "1"}}, create_pr=True, token={STRANGER!r})
more = commit("alice/m", {{"fix.txt": "2"}}, revision=proposed.pr_revision)
draft = api.create_pull_request("alice/m", title="a draft")
for _ in range(2):
    api.create_tag("alice/m", tag="v1.0", exist_ok=True)
    api.create_branch("alice/m", branch="trial/one", exist_ok=True)
commit("alice/m", {{"t.txt": "t"}}, revision="trial/one")
refs = api.list_repo_refs("alice/m", include_pull_requests=True)
result = {{
    "pr": [proposed.pr_num, proposed.pr_revision, draft.num, draft.status],
    "again": refusal(lambda: api.create_tag("alice/m", tag="v1.0")),
    "tags": {{one.name: one.target_commit for one in refs.tags}},
    "branches": sorted(one.name for one in refs.branches), "prs": sorted(one.ref for one in refs.pull_requests),
    "log": [one.title for one in api.list_repo_commits("alice/m")],
    "discussions": [one.title for one in api.get_repo_discussions("alice/m")],
    "by tag": api.model_info("alice/m", revision="v1.0").sha,
    "proposed": open(hf_hub_download("alice/m", "fix.txt", revision="refs/pr/1")).read(),
}}
api.update_repo_settings("alice/m", private=True)
result["private"] = api.model_info("alice/m").private
api.delete_tag("alice/m", tag="v1.0")
api.delete_branch("alice/m", branch="trial/one")
"""
    result = run_client(hub, tmp_path, script)
    assert repository.head == main and repository.private and result["private"]
    assert result["pr"] == [1, "refs/pr/1", 2, "open"]
    assert result["again"]["status"] == 409
    assert (result["tags"], result["by tag"], result["proposed"]) == ({"v1.0": main}, main, "2")
    assert (result["branches"], result["prs"]) == (["main", "trial/one"], ["refs/pr/1", "refs/pr/2"])
    assert result["log"] == ["Edit on the website", "initial commit"]
    assert result["discussions"] == ["push", "a draft"]
    assert (repository.tags, list(repository.branches)) == ({}, ["main"])


def test_listings_come_in_pages_and_parts_of_files_on_request(tmp_path: Path) -> None:
    content = bytes(range(256))
    with hub_with_people(page_size=3) as hub:
        hub.add_repo("alice/m", {f"folder/{number}.txt": b"x" for number in range(7)} | {"bytes.txt": content})
        script = """
from huggingface_hub.utils import get_session
url = api.endpoint + "/alice/m/resolve/main/bytes.txt"
part = lambda span: get_session().get(url, headers={"Range": span})
result = {
    "files": sorted(api.list_repo_files("alice/m")),
    "top": sorted(one.path for one in api.list_repo_tree("alice/m")),
    "inside": len(list(api.list_repo_tree("alice/m", "folder"))),
    "some": [one.path for one in api.get_paths_info("alice/m", ["bytes.txt", "absent.txt"])],
    "part": [part("bytes=10-19").status_code, part("bytes=10-19").content.hex()],
    "rest": part("bytes=250-").content.hex(), "beyond": part("bytes=256-").status_code,
}
"""
        result = run_client(hub, tmp_path, script)
        pages = [one.query.get("cursor") for one in hub.calls("GET", "/tree/main$")]
    assert result["files"] == [".gitattributes", "bytes.txt", *(f"folder/{number}.txt" for number in range(7))]
    assert result["top"] == [".gitattributes", "bytes.txt", "folder"]
    assert (result["inside"], result["some"]) == (7, ["bytes.txt"])
    assert pages[:4] == [None, "3", "6", "9"]
    assert result["part"] == [206, content[10:20].hex()]
    assert (result["rest"], result["beyond"]) == (content[250:].hex(), 416)


def test_the_storage_origin_refuses_a_token_and_an_unsigned_address(hub: HubServer) -> None:
    hub.add_repo("alice/m", {"w.bin": b"weights"})
    with pytest.raises(urllib.error.HTTPError) as redirect:  # urllib is told not to follow, to see the address
        opener = urllib.request.build_opener(NoRedirect)
        opener.open(f"{hub.endpoint}/alice/m/resolve/main/w.bin")
    address = redirect.value.headers["Location"]
    assert address.startswith(hub.storage_url)
    assert urllib.request.urlopen(address).read() == b"weights"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Authorization": f"Bearer {WRITE}"}))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(address.partition("?")[0])


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Lets a 302 be seen instead of followed."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing."""


def test_a_client_environment_holds_nothing_of_the_callers(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HTTPS_PROXY", "PYTHONPATH"):
        monkeypatch.setenv(name, "of the caller")
    environment = hub.environment(tmp_path)
    assert "of the caller" not in environment.values()
    assert environment["HF_ENDPOINT"] == hub.endpoint
    assert environment["HF_HOME"].startswith(str(tmp_path))
