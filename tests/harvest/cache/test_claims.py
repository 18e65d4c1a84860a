"""Claims in a shared folder; tests/machine/test_lock.py has who gets a lock and when it is free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from routesae.harvest.cache.claims import Claims
from routesae.machine.lock import Lock


def test_a_claim_is_anothers_until_it_is_released_and_all_end_with_their_context(tmp_path: Path) -> None:
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        claim = ours.take("shard-00003")
        assert claim is not None
        assert (tmp_path / ".shard-00003.claim").exists()
        assert ours.take("shard-00003") is None
        assert theirs.take("shard-00003") is None
        assert theirs.take("shard-00004") is not None
        assert theirs.owner("shard-00005") is None
        owner = theirs.owner("shard-00003")
        assert owner is not None
        assert owner.pid == os.getpid()
        claim.release()
        assert theirs.take("shard-00003") is not None
        claim.release()  # again: it is another's now, and stays
        assert ours.take("shard-00003") is None
    assert list(tmp_path.iterdir()) == []


def test_claims_on_what_is_done_and_those_of_the_dead_end_with_the_context(tmp_path: Path) -> None:
    """However it ends: another machine's claim alone, on what is not done, is left."""
    for name in (".a.claim", ".a.claim.1234", ".b.claim", "a", "a.txt", "zarr.json"):
        (tmp_path / name).touch()
    if (child := os.fork()) == 0:
        Lock(tmp_path / ".c.claim").take()
        os._exit(0)
    os.waitpid(child, 0)
    with suppress(KeyboardInterrupt), Claims(tmp_path):
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.claim", "a", "a.txt", "zarr.json"]
