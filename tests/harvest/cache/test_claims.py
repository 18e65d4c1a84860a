"""Claims in a shared folder; tests/machine/test_lock.py has who gets a lock and when it is free."""

from __future__ import annotations

import os
from pathlib import Path

from routesae.harvest.cache.claims import Claims


def test_a_claim_is_anothers_until_it_is_released_and_all_end_with_their_context(tmp_path: Path) -> None:
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        claim = ours.take("shard-00003")
        assert claim is not None
        assert (tmp_path / ".shard-00003.claim").exists()
        assert ours.take("shard-00003") is None
        assert theirs.take("shard-00003") is None
        assert theirs.take("shard-00004") is not None
        assert (theirs.is_live("shard-00003"), theirs.is_live("shard-00005")) == (True, False)
        owner = theirs.owner("shard-00003")
        assert owner is not None
        assert owner.pid == os.getpid()
        claim.release()
        assert theirs.take("shard-00003") is not None
        claim.release()  # again: it is another's now, and stays
        assert ours.take("shard-00003") is None
    assert list(tmp_path.iterdir()) == []


def test_sweeping_deletes_claims_on_what_is_done_and_their_remains(tmp_path: Path) -> None:
    for name in (".a.claim", ".a.claim.1234", ".b.claim", "a.txt"):
        (tmp_path / name).touch()
    Claims(tmp_path).sweep(lambda name: name == "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.claim", "a.txt"]
