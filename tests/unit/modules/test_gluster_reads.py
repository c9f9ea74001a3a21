"""Reads are asked again while a joining peer makes glusterd refuse them without a word."""

from __future__ import annotations

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import gluster

from .conftest import read

WORDLESS = "<?xml version='1.0'?><cliOutput><opRet>-22</opRet><opErrno>0</opErrno><opErrstr/></cliOutput>"
PLAIN = "<cliOutput><opRet>-1</opRet><opErrno>1</opErrno><opErrstr>no such thing</opErrstr></cliOutput>"


def cli(*answers: str) -> tuple[gluster.Cli, list[int]]:
    """A gluster that gives these answers, the last one for ever."""
    asked: list[int] = []

    def run_command(_command: object, **_more: object) -> tuple[int, str, str]:
        asked.append(1)
        text = answers[min(len(asked), len(answers)) - 1]
        return (0 if "<opRet>0" in text else 1), text, ""

    return gluster.Cli(run_command, "node3"), asked


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(gluster.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(gluster.time, "sleep", lambda _seconds: None)


def test_wordless_refusal_is_asked_again() -> None:
    found, asked = cli(WORDLESS, WORDLESS, read("pool_three", "11.1"))
    assert len(found.pool()) == 3
    assert len(asked) == 3


def test_wordless_refusal_that_lasts_is_an_error() -> None:
    found, asked = cli(WORDLESS)
    with pytest.raises(gluster.GlusterError, match=r"opRet -22.*no text"):
        found.pool()
    assert 3 < len(asked) < 30


def test_refusal_with_words_is_an_error_at_once() -> None:
    found, asked = cli(PLAIN)
    with pytest.raises(gluster.GlusterError, match="no such thing"):
        found.pool()
    assert len(asked) == 1
