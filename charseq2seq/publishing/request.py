"""What is asked of a push, and how it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from charseq2seq.publishing.plan import Change

DEFAULT_REPO_NAME = "shakespeare-transformer"
MAIN = "main"


@dataclass(frozen=True)
class PublishRequest:
    """What to publish as what.

    Attributes:
        repo_name: of the repository, without its owner.
        username: its owner, a user or an organisation; None: HF_USERNAME, else the token's user.
        token, token_file: None: HF_TOKEN, else the stored login.
        private: make a new repository private, and refuse an existing public one.
        commit_message: None: one that tells loss and steps.
        revision: the branch to push to; made if it is not there.
        create_pr: propose the push instead of making it.
        tag: names the commit.
        overwrite: push over a repository that this suite did not make.
        only_if_better: push only if the loss is lower than the published one by more than this many nats.
        verify: download what was pushed, and run it.
        timeout: seconds that one request may wait for an answer.
        deadline: seconds that everything may take.
    """

    repo_name: str = DEFAULT_REPO_NAME
    username: str | None = None
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    private: bool = False
    commit_message: str | None = None
    revision: str = MAIN
    create_pr: bool = False
    tag: str | None = None
    overwrite: bool = False
    only_if_better: float | None = None
    verify: bool = True
    timeout: float = 60.0
    deadline: float = 3600.0


@dataclass(frozen=True)
class Outcome:
    """How a push ended.

    Attributes:
        state: "pushed", "proposed", "up to date", "not better", "planned" or "checked".
        url: where the model lives, or will; of a proposal, the pull request.
        commit: id of the commit that holds what was asked for, where there is one.
        plan: the files, as they were before.
    """

    state: str
    url: str
    repo_id: str
    commit: str | None = None
    plan: tuple[Change, ...] = ()

    def as_json(self) -> str:
        """On one line, for programs."""
        files = {change.name: change.state for change in self.plan}
        facts = {"ok": True, "state": self.state, "url": self.url, "repo_id": self.repo_id}
        return json.dumps({**facts, "commit": self.commit, "files": files, "exit_code": 0})
