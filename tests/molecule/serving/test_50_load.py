"""Ten thousand requests to the address on kept connections, and none that fails."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

from helpers import SEED, SITE, picture, sha256

CONNECTIONS, REQUESTS = 16, 10_000
PAGES = 0.05  # their share


def test_no_request_of_many_fails(rig):
    rows = [rig.upload(SITE, picture(size)) for size in (500, 20_000, 50_000, 300_000) for _ in range(5)]
    large = rig.upload(SITE, picture(3 << 20))

    def some(number: int) -> list[str]:
        """Ask on one connection; return what went wrong."""
        chance, bad = random.Random(f"{SEED} load {number}"), []
        connection = HTTPConnection(rig.vip, timeout=60)
        for _ in range(REQUESTS // CONNECTIONS):
            row, what = chance.choice(rows), chance.random()
            path, headers, status = urlsplit(row["url"]).path, {}, 200
            if what < PAGES:
                path, row = "/", None
            elif what < 3 * PAGES:
                first = chance.randrange(large["size"] - 1000)
                row, path, status = large, urlsplit(large["url"]).path, 206
                headers = {"Range": f"bytes={first}-{first + 999}"}
            try:
                connection.request("GET", path, headers=headers)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, HTTPException) as error:
                bad.append(f"{path}: {error!r}")
                connection.close()
                continue
            if answer.status != status:
                bad.append(f"{path}: {answer.status}")
            elif status == 206 and len(body) != 1000:
                bad.append(f"{path}: {len(body)} bytes of a range")
            elif status == 200 and row and sha256(body) != row["sha256"]:
                bad.append(f"{path}: other bytes")
        connection.close()
        return bad

    start = time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        bad = [one for found in pool.map(some, range(CONNECTIONS)) for one in found]
    took = time.monotonic() - start
    print(f"{REQUESTS} requests on {CONNECTIONS} connections in {took:.1f} s, {len(bad)} failed")
    assert not bad, f"{len(bad)} of {REQUESTS} failed: {bad[:10]}"
