"""The commands `routesae cache …`."""

from __future__ import annotations

import click

from routesae.console.commands import BLOCKS, WATCH, command
from routesae.reporting import FailedRun


@click.group()
def cache() -> None:
    """Look at a cache, or prove it whole."""


@command(cache)
@click.argument("path", help="Folder or URL of the cache.")
def info(path: str) -> None:
    """Manifest, shards present and missing, bytes, statistics a layer.

    Example: routesae cache info shards/
    """
    from routesae.console.terminal import table
    from routesae.harvest.cache.inspect import describe

    description = describe(path)
    for name, value in description.facts.items():
        click.echo(f"{name:22} {value}")
    click.echo()
    click.echo(table(description.layers))


@command(cache, WATCH, BLOCKS)
@click.argument("path", help="Folder or URL of the cache.")
@click.option("--digest", is_flag=True, help="Print one digest of what the cache holds, however it was written.")
def verify(path: str, digest: bool = False) -> None:
    """Check sizes, indexes and checksums of every shard; exit code 1 and a line for each that is bad.

    Example: routesae cache verify shards/ --digest
    """
    from routesae.console.options import watching
    from routesae.harvest.cache.verify import verify as run

    with watching() as report:
        result = run(path, report)
    for problem in result.problems:
        click.echo(problem)
    if digest:
        click.echo(f"sha256:{result.digest}")
    if result.problems:
        raise FailedRun(
            f"{path}: {len(result.problems)} problems; `routesae cache repair {path}` removes bad shards, and the "
            "same routesae harvest then writes what is missing"
        )
    if not digest:
        click.echo(f"{path}: every shard is whole")


@command(cache, WATCH)
@click.argument("path", help="Folder or URL of the cache.")
def repair(path: str) -> None:
    """Remove the shards that `cache verify` finds bad, and nothing else; harvest then writes those again.

    Example: routesae cache repair shards/
    """
    from routesae.console.options import watching
    from routesae.harvest.cache.verify import repair as run

    with watching() as report:
        result = run(path, report)
    for name in result.removed:
        click.echo(f"removed {name}")
    if result.missing:
        click.echo(f"{path}: {result.missing} shards are missing; the same routesae harvest writes just those")
    else:
        click.echo(f"{path}: every shard is whole")


@command(cache, WATCH, BLOCKS)
@click.argument("sources", nargs=-1, required=True, help="Caches to take shards from.")
@click.argument("target", help="Folder or URL of the cache to make.")
@click.option("--link", is_flag=True, help="Make hard links instead of copies where both are on one file system.")
def merge(sources: tuple[str, ...], target: str, link: bool = False) -> None:
    """Make TARGET one cache of parts that were harvested apart; every checksum is compared.

    The same command goes on where it was stopped, and further parts may come later.

    Example: routesae cache merge node0/shards node1/shards shards/
    """
    _copy(sources, target, link=link)


@command(cache, WATCH, BLOCKS)
@click.argument("source", help="Folder or URL to copy from.")
@click.argument("target", help="Folder or URL of the cache to make.")
def copy(source: str, target: str) -> None:
    """Copy a cache from a folder or URL to another; what arrived is read again and every checksum compared.

    The same command goes on where it was stopped.

    Example: routesae cache copy shards/ s3://bucket/shards
    """
    _copy((source,), target)


def _copy(sources: tuple[str, ...], target: str, *, link: bool = False) -> None:
    from routesae.console.options import watching
    from routesae.harvest.cache.copying import copy as run

    with watching() as report:
        result = run(sources, target, link=link, report=report)
    click.echo(f"{target}: {result.copied} shards copied")
    if result.missing:
        click.echo(
            f"{target}: {result.missing} shards are not in {', '.join(sources)}; add further parts with routesae "
            "cache merge, or harvest them"
        )
