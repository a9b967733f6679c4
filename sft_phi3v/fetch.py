"""Pictures from URLs: many at once, polite to each host, and never a failure without its reason.

A picture is fetched over http or https only. A request that fails for a passing reason (429, 5xx, a cut connection) is
made again after a pause that doubles, or as long as `Retry-After` says; while it lasts the whole host is left alone.
What arrives is kept by its content, so that a URL is never fetched twice and two URLs of one picture are stored once:

    pictures/blobs/4a/4a1c…          the bytes, under their SHA-256
    pictures/urls/9f/9f02… -> …      the SHA-256 of the URL, a link to them
"""

import asyncio
import hashlib
import ipaddress
import os
import random
import re
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

REDIRECTS = 5
MOST_PAUSE = 60.0  # seconds; a host that asks for more is asked again by the next run
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_SECRET = re.compile("sig|token|key|secret|passw|credential|auth", re.IGNORECASE)
_METADATA_V6 = ipaddress.ip_address("fd00:ec2::254")  # where AWS has its credentials in IPv6
_BINARY = {"application/octet-stream", "binary/octet-stream", ""}  # what object stores say of everything


def shown(url: str) -> str:
    """A URL as anybody may see it: what is written down is uploaded later, and must hold no password or signature."""
    if "://" not in url:
        return url
    try:
        address = URL(url)
        hidden = [(name, "…" if _SECRET.search(name) else value) for name, value in address.query.items()]
        if address.user is None and address.password is None and hidden == list(address.query.items()):
            return url
        return address.with_user(None).with_query(hidden).with_fragment(None).human_repr()
    except ValueError:
        return "a URL that is none"


class Refusal(Exception):
    """
    Why there is no picture.

    Args:
        reason (`str`): A word of the manifest's vocabulary, such as `"http_404"` or `"truncated"`.
        detail (`str`): The same for people.
        attempts (`int`, *optional*): Requests that were made.
    """

    def __init__(self, reason: str, detail: str, attempts: int = 0) -> None:
        super().__init__(reason, detail, attempts)  # all of them, so that it can be pickled
        self.reason, self.detail, self.attempts = reason, detail, attempts


class _Passing(Exception):
    """A failure that another request may not meet; `pause` is what the host asked for, in seconds."""

    def __init__(self, reason: str, detail: str, pause: float | None = None) -> None:
        super().__init__(reason, detail, pause)
        self.reason, self.detail, self.pause = reason, detail, pause


@dataclass(frozen=True)
class Limits:
    """How much at once, how long, how often and how large: the recipe's `fetch_*` and `max_bytes`."""

    connections: int
    per_host: int
    timeout: float
    attempts: int
    max_bytes: int


class Store:
    """
    Files by content, and where each URL's content is. Safe under several processes and `kill -9`: a file is renamed
    into place when it is whole, and its name says what it must hold.

    Args:
        folder (`Path`): Made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, content: bytes) -> str:
        """Keeps content; returns its SHA-256."""
        digest = hashlib.sha256(content).hexdigest()
        blob = self._blob(digest)
        aside = self._aside(blob)
        try:
            _write(aside, content)
        except FileNotFoundError:  # asking first would cost each of many pictures what only the first needs
            os.makedirs(os.path.dirname(aside), exist_ok=True)
            _write(aside, content)
        os.replace(aside, blob)
        return digest

    def add(self, url: str, content: bytes) -> None:
        """Keeps what a URL gave."""
        digest, link = self.put(content), self._link(url)
        target = f"../../blobs/{digest[:2]}/{digest}"
        try:
            os.symlink(target, link)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(link), exist_ok=True)
            self.add(url, content)
        except FileExistsError:
            aside = self._aside(link)
            os.symlink(target, aside)
            os.replace(aside, link)

    def find(self, url: str) -> bytes | None:
        """What a URL gave, if it was fetched before and the file is still what its name says."""
        try:
            digest = os.path.basename(os.readlink(self._link(url)))
        except OSError:
            return None
        return self.read(digest)

    def read(self, digest: str) -> bytes | None:
        """The content with this SHA-256, or `None`: a power cut can leave a file of the right name and wrong bytes."""
        try:
            with open(self._blob(digest), "rb") as file:
                content = file.read()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == digest else None

    @staticmethod
    def _aside(path: str) -> str:
        folder, name = os.path.split(path)
        return f"{folder}/.{name}.{os.getpid()}.{random.getrandbits(32):08x}"

    def _blob(self, digest: str) -> str:
        return f"{self.folder}/blobs/{digest[:2]}/{digest}"

    def _link(self, url: str) -> str:
        name = hashlib.sha256(url.encode()).hexdigest()
        return f"{self.folder}/urls/{name[:2]}/{name}"


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


class _Resolver(AbstractResolver):
    """Asks for each host's addresses once, so that the address that was checked is the one that is connected to."""

    def __init__(self) -> None:
        self._threaded, self._known = ThreadedResolver(), dict[str, list[ResolveResult]]()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        if host not in self._known:
            self._known[host] = await self._threaded.resolve(host, port, socket.AF_UNSPEC)
        return [{**address, "port": port} for address in self._known[host]]

    async def close(self) -> None:
        await self._threaded.close()


class Fetcher:
    """
    Fetches pictures. An asynchronous context manager, for one event loop.

    Args:
        limits ([`Limits`]): Bounds on connections, time, attempts and size.
        store ([`Store`]): Where what was fetched is kept and looked up first.
    """

    def __init__(self, limits: Limits, store: Store) -> None:
        self.limits, self.store = limits, store
        self._resolver = _Resolver()
        self._free_at: dict[str, float] = {}  # hosts that asked for a pause, and until when
        self._slots = asyncio.Semaphore(limits.connections)
        self._host_slots = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(limits.per_host))
        self._url_locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}

    async def __aenter__(self) -> "Fetcher":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=self._resolver, use_dns_cache=False),
            timeout=aiohttp.ClientTimeout(total=self.limits.timeout, sock_connect=min(10, self.limits.timeout)),
            headers={"User-Agent": "sft_phi3v (data preparation)", "Accept": "image/*,*/*;q=0.5"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=True,  # proxies, as companies have them
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> tuple[bytes, int]:
        """
        The bytes behind a URL, from the store or else from the network.

        Args:
            url (`str`): An http or https URL.

        Returns:
            `tuple[bytes, int]`: The content, and the number of requests that it took; 0 from the store.

        Raises:
            Refusal: With the reason of the last failure.
        """
        async with self._alone(url):
            found = self.store.find(url)
            if found is not None and len(found) <= self.limits.max_bytes:
                return found, 0
            for attempt in range(1, self.limits.attempts + 1):
                try:
                    content = await self._follow(url)
                except Refusal as refusal:
                    refusal.attempts = attempt
                    raise
                except _Passing as failure:
                    # Up to twice as long, so that many requests that failed together do not come back together.
                    pause = 0.25 * 2**attempt * random.uniform(1, 2) if failure.pause is None else failure.pause
                    if attempt == self.limits.attempts or pause > MOST_PAUSE:
                        asked = f"; it asks for a pause of {pause:.0f} s" if failure.pause else ""
                        raise Refusal(failure.reason, f"{failure.detail}{asked}", attempt) from failure
                    if failure.pause is not None:
                        self._free_at[str(URL(url).host)] = time.monotonic() + pause
                    await asyncio.sleep(pause)
                else:
                    self.store.add(url, content)
                    return content, attempt
        raise AssertionError("`attempts` is at least 1")

    @asynccontextmanager
    async def _alone(self, url: str) -> AsyncIterator[None]:
        """Lets one task at a time deal with a URL: rows that share a picture fetch it once."""
        lock, users = self._url_locks.setdefault(url, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                self._url_locks.pop(url, None)

    async def _follow(self, start: str) -> bytes:
        try:
            url = first = URL(start)
        except ValueError:
            raise Refusal("address", "not a URL") from None
        for _ in range(REDIRECTS + 1):
            await self._check(url, first)
            host = str(url.host)
            while (pause := self._free_at.get(host, 0) - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            async with self._slots, self._host_slots[host]:
                answer = await self._ask(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise Refusal("redirects", f"more than {REDIRECTS} redirects, the last to {shown(str(url))}")

    async def _check(self, url: URL, first: URL) -> None:
        """Refuses what a table from elsewhere, or a redirect, must not make this machine read."""
        if url.scheme not in ("http", "https") or not url.host:
            raise Refusal("address", f"{shown(str(url))} is not an http or https URL")
        try:
            addresses = [ipaddress.ip_address(url.host)]
        except ValueError:
            if url.scheme in getproxies() and not proxy_bypass(url.host):
                return  # the proxy looks up the name, and decides what may be reached
            try:
                found = await self._resolver.resolve(url.host)
                addresses = [ipaddress.ip_address(entry["host"].partition("%")[0]) for entry in found]
            except OSError as error:
                raise _Passing("connection", f"{url.host} has no address: {error}") from None
        for address in addresses:
            inner = getattr(address, "ipv4_mapped", None) or address
            # Cloud machines keep their credentials at a link-local address: no row has business there.
            if inner.is_link_local or inner == _METADATA_V6 or (url.host != first.host and not inner.is_global):
                raise Refusal("address", f"{shown(str(url))} leads to the private address {address}")

    async def _ask(self, url: URL) -> bytes | URL:
        """One request: the content, or where it redirects to."""
        answered, name = False, shown(str(url))
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                answered = True
                if response.status in (301, 302, 303, 307, 308):
                    target = response.headers.get("Location", "")
                    if not target:
                        raise Refusal("redirects", f"{name} redirects to nowhere")
                    try:
                        return url.join(URL(target))
                    except ValueError:
                        raise Refusal("address", f"{name} redirects to what is not a URL") from None
                if response.status != 200:
                    kind = f"http_{response.status}"
                    detail = f"{name} answered {response.status} {response.reason or ''}".rstrip()
                    if response.status in _PASSING:
                        raise _Passing(kind, detail, _retry_after(response.headers.get("Retry-After")))
                    raise Refusal(kind, detail)
                content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                if not (content_type.startswith("image/") or content_type in _BINARY):
                    raise Refusal("content_type", f"{name} is {content_type}, expected a picture")
                return await self._read(response, name)
        except TimeoutError:
            detail = f"{name} was not through in {self.limits.timeout:g} s"
            if answered:  # a server that trickles does so again, and each time costs all of the time there is
                raise Refusal("timeout", detail) from None
            raise _Passing("timeout", detail) from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise Refusal("address", f"{name} is not a URL") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Passing("connection", f"{name}: {error or type(error).__name__}") from None

    async def _read(self, response: aiohttp.ClientResponse, name: str) -> bytes:
        most = self.limits.max_bytes
        if (response.content_length or 0) > most:
            raise Refusal("too_large", f"{name} has {response.content_length:,} bytes, more than max_bytes {most:,}")
        parts, size = list[bytes](), 0
        async for part in response.content.iter_chunked(1 << 16):
            parts.append(part)
            size += len(part)
            if size > most:
                raise Refusal("too_large", f"{name} has more than max_bytes {most:,} bytes")
        return b"".join(parts)


def _retry_after(value: str | None) -> float | None:
    """Seconds from now, as a number or an HTTP date says it."""
    if value is None:
        return None
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
