"""What the tests of pushing rely on in the Hub on loopback, and would not see if it were missing."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from tests.hub.server import WRITE, HubServer, hub_with_people


def test_the_storage_origin_refuses_a_token_and_an_unsigned_address(hub: HubServer) -> None:
    hub.add_repo("alice/m", {"w.bin": b"weights"})
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
    connection.request("GET", "/alice/m/resolve/main/w.bin")
    address = connection.getresponse().headers["Location"]
    connection.close()
    assert address.startswith(hub.storage_url)
    assert urllib.request.urlopen(address).read() == b"weights"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Authorization": f"Bearer {WRITE}"}))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(address.partition("?")[0])


def test_a_defect_of_the_server_itself_fails_the_test_that_uses_it() -> None:
    with pytest.raises(AssertionError, match="KeyError"), hub_with_people() as hub:
        headers = {"Authorization": f"Bearer {WRITE}"}
        nonsense = urllib.request.Request(f"{hub.endpoint}/api/repos/create", b"{}", headers, method="POST")
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(nonsense)
