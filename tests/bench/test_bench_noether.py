"""The benchmark of the whole published model, where that is not installed."""

import sys

from bench import noether


def test_it_says_why_it_measures_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "noether", None)
    monkeypatch.setattr(sys, "argv", ["noether"])
    assert noether.main() == 0
    assert "skipped: emmiai-noether" in capsys.readouterr().out
