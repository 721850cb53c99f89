"""scripts/bench_batch: it measures each configuration and prints a table."""

from __future__ import annotations

import pytest

from tests.scripts.helpers import run_script


@pytest.mark.slow
def test_it_prints_a_table_of_all_configurations():
    pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
    done = run_script(
        "bench_batch", "--sounds", "16", "--batch-size", "2", "--steps", "2", "--seconds", "0.64"
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == [
        "local, 1 thread",
        "Ray, 1 worker of 1 thread",
        "local, 2 threads",
        "Ray, 2 workers of 1 thread",
    ]
    for _, rate, overhead, startup, total in rows:
        assert float(rate) > 0
        assert overhead.strip() == "-" or overhead.strip().endswith(" %")
        assert 0 < float(startup) < float(total)
    assert "16 sounds of `tiny`" in done.stdout


def test_too_few_sounds_are_refused():
    done = run_script("bench_batch", "--sounds", "15")
    assert done.returncode == 2
    assert "--sounds must be at least 16" in done.stderr
