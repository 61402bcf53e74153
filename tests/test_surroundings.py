"""What surrounds a push and is not as it should be: variables, tokens, folders, whoever stands before the Hub.

Each case was met by people elsewhere. It ends in one sentence that says what, where and what to do, or is put right.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.errors import ExitCode
from tests.hub.server import LFS_ONLY, STRANGER, WRITE, HubServer, fake_token
from tests.push_client import NAME, REPO, Publisher, Push, titles
from tests.train_client import TINY, Trainee
from tests.warm_client import WarmClient


def see(done: Push, code: ExitCode, *words: str) -> None:
    """Check how a push ended: with this code and, in what it says of the reason, these words."""
    assert done.code == code, done.log
    for word in words:
        assert word in done.log, done.log


# --- variables of the environment

PROXY = "socks://bob:swordfish@127.0.0.1:7890"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ALL_PROXY": PROXY}, "ALL_PROXY=socks://…@127.0.0.1:7890 (Unknown scheme"),
        ({"all_proxy": "ftp://127.0.0.1:1", "HTTPS_PROXY": "http://127.0.0.1:1"}, "all_proxy=ftp://127.0.0.1:1 ("),
        ({"https_proxy": "http://127.0.0.1:port"}, "https_proxy=http://127.0.0.1:port ("),
        ({"HF_ENDPOINT": "hf-mirror.com"}, "HF_ENDPOINT=hf-mirror.com (an address is https://HOST"),
        ({"SSL_CERT_FILE": "/no/such/cacert.pem"}, "SSL_CERT_FILE=/no/such/cacert.pem ("),
        ({"HF_HUB_ETAG_TIMEOUT": "ten"}, "HF_HUB_ETAG_TIMEOUT=ten ("),
    ],
)
def test_a_wrong_variable_is_named(variables: dict[str, str], says: str, alice: Publisher) -> None:
    done = alice.push("--check", "--json", **variables)
    see(done, ExitCode.UNAVAILABLE, says, "correct or unset it")
    assert "swordfish" not in done.log and "; " not in done.json["cause"], "it alone"
    assert done.json["error"] == "environment" and not alice.hub.requests


@pytest.mark.skipif(find_spec("socksio") is not None, reason="socksio is installed")
def test_every_proxy_without_its_library_is_named(alice: Publisher) -> None:
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "socks5h://127.0.0.1:7890")
    see(alice.push("--check", **proxies), ExitCode.UNAVAILABLE, *proxies, "pip install socksio")


def test_a_variable_set_to_nothing_is_not_set(alice: Publisher) -> None:
    nothing = ("SSL_CERT_FILE", "HF_HOME", "HF_HUB_ETAG_TIMEOUT", "ALL_PROXY", "HF_OIDC_RESOURCE", "HF_TOKEN_PATH")
    see(alice.push("--check", **dict.fromkeys(nothing, "")), ExitCode.OK)
    assert not list(alice.home.glob("token*")) and not (alice.home / "hub").exists()


def test_a_dead_proxy_is_named_where_the_hub_cannot_be_reached(alice: Publisher) -> None:
    proxy = alice.hub.dead_url.replace("//", "//bob:swordfish@")
    done = alice.push("--check", HF_ENDPOINT="http://hub.example", HTTP_PROXY=proxy)
    shown = f"HTTP_PROXY={proxy.replace('bob:swordfish', '…')}"
    see(done, ExitCode.UNAVAILABLE, shown, "HF_ENDPOINT=http://hub.ex")
    assert "swordfish" not in done.log


# --- tokens


@pytest.mark.parametrize("wrapped", ['"{}"', "“{}”", 'export HF_TOKEN="{}"', "Bearer {}", "\ufeff{}\r\n"])
def test_what_is_copied_with_a_token_is_taken_off(wrapped: str, alice: Publisher) -> None:
    see(alice.push("--check", HF_TOKEN=wrapped.format(WRITE)), ExitCode.OK, "account: alice")


def test_a_blank_variable_hides_no_other_token(alice: Publisher) -> None:
    done = alice.push("--check", token=None, HF_TOKEN=" ", HUGGING_FACE_HUB_TOKEN=WRITE)
    see(done, ExitCode.OK, "token: from HUGGING_FACE_HUB_TOKEN", "account: alice")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("where", ["my.token", "huggingface/token"])
def test_a_token_file_may_come_from_windows(where: str, encoding: str, alice: Publisher) -> None:
    path = alice.home / where
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(("\ufeff" * (encoding == "utf-16-be") + WRITE + "\r\n").encode(encoding))
    flag = ["--token_file", where] if where == "my.token" else []
    see(alice.push("--check", *flag, token=None), ExitCode.OK, "account: alice")


def test_a_refused_token_is_told_from_what_was_not_used(alice: Publisher) -> None:
    login = alice.home / "huggingface" / "token"
    login.parent.mkdir()
    login.write_text(WRITE)
    done = alice.push("--check", token=fake_token("expired"))
    see(done, ExitCode.NO_PERMISSION, "it is from HF_TOKEN", "the stored login was not used")
    done = alice.push("--check", "--token", fake_token("expired"))
    see(done, ExitCode.NO_PERMISSION, "it is from the command line", "HF_TOKEN was not used", "login was not")


@pytest.mark.parametrize("flag", ["--token", "--username", "--repo_name", "--tag", "--revision"])
def test_an_empty_flag_is_a_wrong_argument(flag: str, alice: Publisher) -> None:
    see(alice.push("--check", flag, ""), ExitCode.USAGE, f"{flag} must be something")
    assert not alice.hub.requests


def test_the_name_of_a_file_is_no_token(alice: Publisher) -> None:
    (alice.home / "my.token").write_text(WRITE)
    for given in ("my.token", str(alice.home / "my.token")):
        see(alice.push("--check", HF_TOKEN=given), ExitCode.NO_PERMISSION, "from HF_TOKEN is the name of a file")


def test_a_login_that_belongs_to_root_is_named(alice: Publisher) -> None:
    (alice.home / "huggingface").mkdir()
    login = alice.home / "huggingface" / "token"
    login.write_text(WRITE)
    login.chmod(0)
    see(alice.push("--check", token=None), ExitCode.IO_ERROR, f"{login}: Permission denied")
    (alice.home / "huggingface").chmod(0)
    see(alice.push("--check"), ExitCode.OK, "cannot be written")


# --- accounts and names


@pytest.mark.parametrize("name", ["alice\n", "Alice", "@alice"])
def test_a_users_name_may_be_written_otherwise(name: str, alice: Publisher) -> None:
    see(alice.push("--check", HF_USERNAME=name), ExitCode.OK, f"/{REPO}")
    see(alice.push("--check", "--username", name, "--commit_message", "@bob: better"), ExitCode.OK, f"/{REPO}")


def test_an_account_that_was_renamed_is_told_its_name(alice: Publisher) -> None:
    alice.hub.add_repo(f"old_name/{NAME}")
    alice.hub.rename(f"old_name/{NAME}", REPO)
    done = alice.push("--no_verify", HF_USERNAME="old_name")
    see(done, ExitCode.OK, f"note: that is {REPO} by now", "namespace alice: their own")
    assert b"old_name" not in alice.hub.repo(REPO).files()["README.md"] and len(titles(alice.hub)) == 1


def test_the_role_that_may_not_write_is_named(alice: Publisher) -> None:
    alice.hub.add_repo(f"club/{NAME}")
    done = alice.push("--check", "--username", "club")
    see(done, ExitCode.NO_PERMISSION, "the role of alice there is contributor", "propose with --create_pr")
    see(alice.push("--check", "--username", "club", "--create_pr"), ExitCode.OK)


def test_training_names_its_own_flags(client: WarmClient, hub: HubServer, user: Trainee) -> None:
    hub.add_repo(REPO, {"a.py": b"1"})
    arguments = ["--push_to_hf", "--data_path", "text.txt", *TINY]
    environment: dict[str, Any] = hub.environment(user.home, WRITE)
    done = client.run(user.home, *arguments, **environment)
    assert done.code == ExitCode.CONFLICT and "choose another --hf_repo_name" in done.log
    assert "with push_to_huggingface.py --overwrite" in done.log
    for said in (done.log, done.report["remedy"]):
        assert not re.search(r"(?<!push_to_huggingface\.py )--(?!hf_)", said.split("what to do")[-1])
    done = client.run(user.home, *arguments, **environment | {"HF_TOKEN": STRANGER, "HF_USERNAME": "bob"})
    assert done.code == ExitCode.NO_PERMISSION and "correct --hf_username" in done.log


# --- who stands before the Hub


def test_a_networks_login_page_is_not_the_hub(alice: Publisher) -> None:
    alice.hub.fail("GET", "whoami", status=302, headers={"Location": f"{alice.hub.storage_url}/login"})
    page = {"Content-Type": "text/html; charset=utf-8"}
    alice.hub.fail("GET", "/login", status=200, headers=page, body=b"<html>")
    see(alice.push("--check"), ExitCode.UNAVAILABLE, "this is not the Hub", "answered with a web page", "login page")
    assert not {one.token for one in alice.hub.requests if one.listener == "storage"} - {None}
    for status in (403, 404, 511):  # a company's filter, a router
        alice.hub.mend()
        alice.hub.fail("GET", "whoami", status=status, headers=page, body=b"<html>blocked")
        see(alice.push("--check"), ExitCode.UNAVAILABLE, "this is not the Hub", "login page")


def test_a_mirror_that_is_only_read_from_is_named(alice: Publisher) -> None:
    endpoint = f"HF_ENDPOINT={alice.hub.endpoint}"
    alice.hub.fail("POST", "/api/", status=405)
    see(alice.push("--no_verify"), ExitCode.UNAVAILABLE, "this is not the Hub (HTTP 405", endpoint)
    alice.hub.mend()
    alice.hub.fail("GET", "/api/models/", status=401, message="Invalid username or password.")
    see(alice.push("--check"), ExitCode.NO_PERMISSION, "it accepted this token a moment ago", endpoint)


# --- what passes


def test_what_fails_once_is_tried_again(alice: Publisher) -> None:
    hub = alice.hub
    hub.fail("POST", "/repos/create", status=409, message="Conflict", call=lambda: hub.add_repo(REPO), times=1)
    hub.fail("PUT", "/lfs/", status=403, body=b"<Error><Message>Request has expired</Message></Error>", times=1)
    hub.fail("POST", "/commit/", status=403, times=1)
    done = alice.push("--no_verify", **LFS_ONLY)
    see(done, ExitCode.OK, "somebody else is pushing", "the storage refused a file", "no right to write")
    assert done.log.count("trying again") == 3 and len(titles(hub)) == 1
    assert len(hub.calls("POST", "/objects/batch")) == 2, "a new address"


# --- folders


def test_a_home_that_cannot_be_written_does_no_harm(hub: HubServer, tmp_path: Path) -> None:
    alice = Publisher(hub, tmp_path / "alice")
    (tmp_path / "temporary").mkdir()
    alice.home.chmod(0o500)
    done = alice.push("--json", "--no_verify", TMPDIR=str(tmp_path / "temporary"))
    alice.home.chmod(0o700)
    see(done, ExitCode.OK, "huggingface cannot be written")
    assert done.json["state"] == "pushed", "stdout holds one line"
    assert "LFS" not in done.log and not list(alice.home.glob("huggingface"))
