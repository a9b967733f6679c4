"""Where the client may go, and what it keeps. The whole way is tested against a server in test_prepare.py."""

import asyncio
import hashlib
import time

import pytest
from yarl import URL

from sft_phi3v.fetch import Fetcher, Limits, Refusal, Store, _retry_after, shown

LIMITS = Limits(connections=4, per_host=2, timeout=1.0, attempts=2, max_bytes=1000)


def checked(tmp_path, names, first, url):
    """The outcome of checking a redirect to `url`, where names have the addresses given."""

    async def run():
        fetcher = Fetcher(LIMITS, Store(tmp_path))

        async def resolve(host, port=0, family=0):
            return [{"host": names[host]}]

        fetcher._resolver.resolve = resolve
        await fetcher._check(URL(url), URL(first))

    asyncio.run(run())


NAMES = {"shop.example": "93.184.216.34", "cdn.example": "151.101.1.1", "rebound.example": "192.168.1.1"}
NAMES |= {"intranet": "10.1.2.3", "mapped.example": "::ffff:10.0.0.1", "local.example": "127.0.0.1"}


@pytest.mark.parametrize(
    "url",
    [
        *("http://rebound.example/a", "http://10.0.0.1/a", "http://[::1]/a", "http://mapped.example/"),
        *("http://local.example/", "file:///etc/passwd", "ftp://cdn.example/a", "http://169.254.169.254/"),
    ],
)
def test_no_redirect_leads_into_a_private_address(tmp_path, url):
    with pytest.raises(Refusal) as refused:
        checked(tmp_path, NAMES, "http://shop.example/a.jpg", url)
    assert refused.value.reason == "address"


def test_public_hosts_and_a_row_s_own_private_host_are_fine(tmp_path):
    checked(tmp_path, NAMES, "http://shop.example/a", "https://cdn.example/b")
    checked(tmp_path, NAMES, "http://intranet/a", "http://intranet/b")
    with pytest.raises(Refusal):
        checked(tmp_path, NAMES, "http://169.254.169.254/a", "http://169.254.169.254/a")


def test_what_is_written_down_holds_no_password_and_no_signature():
    assert shown("http://a.example/x y.jpg?id=5") == "http://a.example/x y.jpg?id=5"
    url = shown("https://me:geheim@a.example/x.jpg?id=5&X-Amz-Signature=abc&token=def#part")
    assert url == "https://a.example/x.jpg?id=5&X-Amz-Signature=…&token=…"
    assert "geheim" not in shown("https://me:geheim@[bad/x.jpg")
    for plain in ("design keyé/mon@key 3.jpg", "https://author.example/design/key%20one.jpg?id=%41"):
        assert shown(plain) == plain


def test_retry_after_is_read_as_seconds_and_as_a_date():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert _retry_after("7") == 7 and 27 < _retry_after(date) < 31
    assert _retry_after("soon") is None and _retry_after(None) is None


def test_the_store_keeps_by_content_and_does_not_trust_a_damaged_file(tmp_path):
    store = Store(tmp_path)
    store.add("http://a/1", b"picture")
    store.add("http://b/2", b"picture")
    assert store.find("http://a/1") == store.find("http://b/2") == b"picture"
    blobs = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert [path.name for path in blobs] == [hashlib.sha256(b"picture").hexdigest()]
    blobs[0].write_bytes(b"pict")
    assert store.find("http://a/1") is None
    store.add("http://a/1", b"picture")
    assert store.find("http://a/1") == b"picture" and store.find("http://c/3") is None
