"""Without keys a gateway listens for this machine alone, unless somebody says otherwise in so many words."""

from __future__ import annotations

import pytest

from embedq_gateway.keys.exposure import Exposed, check_exposure, is_loopback, is_same_site


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "::1", "[::1]"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, has_keys=False, allow_anonymous=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.7", "gpu7", "localhost.example", "127.0.0.1.example"]
)
def test_any_other_address_does(host: str) -> None:
    with pytest.raises(Exposed, match="ALLOW_ANONYMOUS=true"):
        check_exposure(host, has_keys=False, allow_anonymous=False)
    check_exposure(host, has_keys=True, allow_anonymous=False)
    check_exposure(host, has_keys=False, allow_anonymous=True)


@pytest.mark.parametrize(
    ("host", "origin", "loopback", "same"),
    [
        (b"localhost:1", None, True, True),
        (b"", None, True, True),
        (b"127.0.0.1", b"http://127.0.0.1", True, True),
        (b"127.0.0.1", b"http://127.0.0.1:1", True, False),
        (b"gpu7:1", None, True, False),
        (b"gpu7:1", None, False, True),
        (b"gpu7:1", b"https://gpu7:1", False, True),
        (b"gpu7:1", b"https://other", False, False),
        (b"[::1]:1", b"null", True, False),
    ],
)
def test_a_page_of_another_site_shows_by_host_and_origin(
    host: bytes, origin: bytes | None, loopback: bool, same: bool
) -> None:
    headers = {b"host": host} | ({} if origin is None else {b"origin": origin})
    assert is_same_site(headers, loopback=loopback) is same
