"""Every store keeps the contract of modelfs.stores.Store; see case.py for how to add one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import partial
from pathlib import Path

import pytest
import trio

import tests.stores
from modelfs.testing import check_store
from tests.stores.case import Case

CASES: list[Case] = [
    case
    for module in pkgutil.iter_modules(tests.stores.__path__)
    if module.name.startswith("cases_")
    for case in importlib.import_module(f"tests.stores.{module.name}").CASES
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_store_keeps_the_contract(case: Case, tmp_path: Path) -> None:
    with case.open(tmp_path) as (store, expected):
        trio.run(partial(check_store, store, expected, secrets=case.secrets))
