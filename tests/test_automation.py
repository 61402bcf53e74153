"""docs/automation.md says what a program finds on stdout: every field and every exit code."""

from __future__ import annotations

import json
import re
from typing import Any

from charseq2seq.errors import ExitCode
from tests.hub.server import WRITE, HubServer
from tests.push_client import Publisher
from tests.train_client import ROOT, TINY, Done, Trainee
from tests.warm_client import WarmClient

PAGE = (ROOT / "docs" / "automation.md").read_text(encoding="utf-8")


def fields(*sections: str) -> set[str]:
    """The fields in some sections' tables."""
    texts = [PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in ("Every object", *sections)]
    return set(re.findall(r"^\| `(\w+)` \|", "".join(texts), re.MULTILINE))


def only_object(done: Done) -> dict[str, object]:
    """What stdout holds, which is one line."""
    (line,) = done.out.splitlines()
    found: dict[str, object] = json.loads(line)
    assert found["exit_code"] == done.code
    return found


def test_each_mode_prints_its_fields_and_nothing_else(client: WarmClient, user: Trainee) -> None:
    trained = only_object(client.train(user, "--max_steps", "4", "--json"))
    assert trained.keys() == fields("Train") and trained["outcome"] == "finished"
    assert str(trained["sample"]).startswith("FIRST CITIZEN:")
    rows = (user.home / "transformer_model.metrics.jsonl").read_text().splitlines()
    assert all(json.loads(row).keys() == fields("While it trains") - fields() for row in rows) and rows
    scored = only_object(client.run(user.home, "--mode", "evaluate", "--data_path", "text.txt", "--json"))
    assert scored.keys() == fields("Evaluate") and scored["nats_per_char"] == trained["nats_per_char"]
    command = ["--mode", "generate", "--prompt", "ALL:", "--num_chars", "9", "--num_samples", "2"]
    written = only_object(client.run(user.home, *command, "--json"))
    assert written.keys() == fields("Generate")
    texts = written["texts"]
    assert isinstance(texts, list) and f"\n{'-' * 40}\n".join(texts) + "\n" == client.run(user.home, *command).out


def test_training_that_pushes_prints_one_object(client: WarmClient, hub: HubServer, user: Trainee) -> None:
    command = ["--data_path", "text.txt", *TINY, "--max_steps", "2", "--push_to_hf", "--json"]
    variables: dict[str, Any] = hub.environment(user.home, WRITE)
    pushed = only_object(client.run(user.home, *command, **variables))
    assert pushed.keys() == fields("Train", "Train and push") and pushed["outcome"] == "pushed"


def test_a_push_prints_its_fields(alice: Publisher) -> None:
    pushed = json.loads(alice.push("--no_verify", "--json").out)
    assert pushed.keys() == fields("Push") and pushed["state"] == "pushed"
    pushed = json.loads(alice.push("--json", token=None).out)
    assert pushed.keys() == fields("What went wrong") | {"ok"} and pushed["error"] == "no_token"


def test_what_goes_wrong_is_an_object_too(client: WarmClient, user: Trainee) -> None:
    hub_only = {"cause", "remedy", "status", "request_id"}
    for mode in (["evaluate"], ["generate"], ["train", "--data_path", "absent.txt"]):
        failed = only_object(client.run(user.home, "--json", "--mode", *mode))
        assert failed.keys() == fields("What went wrong") - hub_only | {"outcome"}
        assert (failed["outcome"], failed["exit_code"]) == ("failed", ExitCode.NO_INPUT)


def test_the_page_has_every_exit_code() -> None:
    assert set(map(int, re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE))) == {int(code) for code in ExitCode}
