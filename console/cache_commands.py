"""The commands `routesae cache …`."""

from __future__ import annotations

from pathlib import Path

import click

from routesae.console.options import CACHE_BYTES, CACHE_DIR, long_run, watching
from routesae.console.terminal import table
from routesae.reporting import FailedRun


@click.group()
def cache() -> None:
    """Look at a cache, or prove it whole."""


@cache.command(epilog="Example: routesae cache info shards/")
@click.argument("path", type=click.Path())
def info(path: str) -> None:
    """Manifest, shards present and missing, bytes, statistics a layer."""
    from routesae.harvest.cache.inspect import describe

    found = describe(path)
    for name, value in found.facts.items():
        click.echo(f"{name:22} {value}")
    click.echo()
    click.echo(table(found.layers))


@cache.command(epilog="Example: routesae cache verify shards/ --digest")
@click.argument("path", type=click.Path())
@click.option("--digest", is_flag=True, help="Print one digest of what the cache holds, however it was written.")
@long_run
@CACHE_DIR
@CACHE_BYTES
def verify(path: str, digest: bool) -> None:
    """Check sizes, indexes and checksums of every shard; exit code 1 and a line for each that is bad."""
    from routesae.harvest.cache.verify import examine

    with watching() as report:
        found = examine(path, report)
    for problem in found.problems:
        click.echo(problem)
    if digest:
        click.echo(f"sha256:{found.digest}")
    if found.problems:
        raise FailedRun(
            f"{path}: {len(found.problems)} problems; `routesae cache repair {path}` removes bad shards, and the "
            "same routesae harvest then writes what is missing"
        )
    if not digest:
        click.echo(f"{path}: every shard is whole")


@cache.command(epilog="Example: routesae cache repair shards/")
@click.argument("path", type=click.Path())
@long_run
def repair(path: str) -> None:
    """Remove the shards that `cache verify` finds bad, and nothing else; harvest then writes those again."""
    from routesae.harvest.cache.verify import repair as run

    with watching() as report:
        found = run(path, report)
    for name in found.removed:
        click.echo(f"removed {name}")
    if found.missing:
        click.echo(f"{path}: {found.missing} shards are missing; the same routesae harvest writes just those")
    else:
        click.echo(f"{path}: every shard is whole")


@cache.command(epilog="Example: routesae cache merge node0/shards node1/shards shards/")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--link", is_flag=True, help="Hard links instead of copies, where both are on one file system.")
@long_run
def merge(sources: tuple[Path, ...], target: Path, link: bool) -> None:
    """Make TARGET one cache of parts that were harvested apart; every checksum is compared.

    The same command goes on where it was stopped, and further parts may come later.
    """
    from routesae.harvest.cache.copying import merge as run

    with watching() as report:
        found = run(sources, target, link=link, report=report)
    click.echo(f"{target}: {found.copied} shards copied")
    if found.missing:
        click.echo(f"{target}: {found.missing} shards are in none of these; merge further parts, or harvest the rest")


@cache.command(epilog="Example: routesae cache copy shards/ s3://bucket/shards")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@long_run
@CACHE_DIR
@CACHE_BYTES
def copy(source: str, target: str) -> None:
    """Copy a cache from a folder or URL to another; what arrived is read again and every checksum compared.

    The same command goes on where it was stopped.
    """
    from routesae.harvest.cache.copying import copy as run

    with watching() as report:
        found = run(source, target, report)
    click.echo(f"{target}: {found.copied} shards copied")
    if found.missing:
        click.echo(f"{target}: {found.missing} shards are not in {source}; harvest them, then copy again")
