"""When the signed links of several stores run out."""

from __future__ import annotations

import base64
import json

import pytest

from modelfs.stores.web import link_expiry

NOW = 1_800_000_000.0


def jwt(payload: object) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip('=')}.c2ln"


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        ("", 240),
        ("Expires=1800000100&Signature=x", 100),
        ("X-Amz-Date=20270115T080000Z&X-Amz-Expires=300", 300),
        ("X-Goog-Date=20270115T080000Z&X-Goog-Expires=86400", 86_400),
        ("se=2027-01-15T09%3A00%3A00Z&sp=r&sig=x", 3600),
        ("se=2027-01-15T09%3A00%3A00Z", 240),
        (f"se=2027-01-15T09%3A00%3A00Z&sig=x&jwt={jwt({'exp': NOW + 300})}", 300),
        (f"jwt={jwt({'exp': NOW - 9})}", 30),
        (f"jwt={jwt({'exp': 'soon'})}", 240),
        (f"jwt={jwt([])}", 240),
        ("jwt=%00&Expires=never&X-Amz-Date=20279999T999999Z", 240),
        ("jwt=a.b.c", 240),
    ],
)
def test_a_link_is_used_until_its_first_end(query: str, seconds: float) -> None:
    assert link_expiry(f"http://127.0.0.1:2/x?{query}", NOW, 240) == NOW + seconds
