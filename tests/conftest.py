"""What all tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from charseq2seq.device import use_threads
from charseq2seq.publishing.folder import build_folder
from tests.hub.server import HubServer, hub_with_people
from tests.push_client import REPO, Publisher, tiny_checkpoint
from tests.train_client import Trainee
from tests.warm_client import WarmClient, warm_client

# A runner started in the background ignores Ctrl-C, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

use_threads(1)  # every worker has one core, as every program that it starts


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Training in a test's own process turns tiny numbers into zeros from then on; Hypothesis refuses to do without."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture
def nobody(tmp_path: Path) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with nobody():` the test is a user without rights, in tmp_path."""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("only root can become a user without rights")

    @contextlib.contextmanager
    def become() -> Iterator[None]:
        tmp_path.chmod(0o755)
        with contextlib.chdir(tmp_path):
            os.seteuid(65534)
            try:
                yield
            finally:
                os.seteuid(0)

    return become


@pytest.fixture(scope="session")
def client() -> WarmClient:
    """Runs command lines."""
    return warm_client()


@pytest.fixture
def user(tmp_path: Path) -> Trainee:
    """A user with a text."""
    return Trainee(tmp_path / "user")


@pytest.fixture(scope="session")
def trained(client: WarmClient, tmp_path_factory: pytest.TempPathFactory) -> Trainee:
    """A user with a trained model, which no test may change."""
    trainee = Trainee(tmp_path_factory.mktemp("trained"))
    done = client.train(trainee, "--max_steps", "8")
    assert done.code == 0, done.log
    return trainee


@pytest.fixture
def owner(trained: Trainee, user: Trainee) -> Trainee:
    """A user with a text, and with the model and resume state of an earlier run."""
    user.model.write_bytes(trained.model.read_bytes())
    user.resume.write_bytes(trained.resume.read_bytes())
    return user


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with people and with Xet."""
    with hub_with_people() as server:
        yield server


@pytest.fixture
def alice(hub: HubServer, tmp_path: Path) -> Publisher:
    """Alice with the checkpoint `tiny_checkpoint()`."""
    return Publisher(hub, tmp_path / "alice")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a push of `tiny_checkpoint()` as alice's default repository publishes."""
    folder = tmp_path_factory.mktemp("built") / "folder"
    build_folder(tiny_checkpoint(), folder, REPO)
    return folder
