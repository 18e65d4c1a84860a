"""Tokens in; US dollars out, and a limit on them that requests under way count against."""

from __future__ import annotations

import asyncio
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from routesae.reporting import WrongInput

PACKAGED = "prices.toml"
MILLION = 1_000_000
SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")  # gpt-4o-2024-08-06 costs what gpt-4o costs


class Used(NamedTuple):
    """Tokens of prompts and of answers."""

    input: int
    output: int


NOTHING = Used(0, 0)


class Price(NamedTuple):
    """US dollars a million tokens."""

    input: float
    output: float

    def dollars(self, used: Used) -> float:
        return (self.input * used.input + self.output * used.output) / MILLION


def price_of(model: str, prices_file: str | None) -> Price | None:
    """What `model` costs, by the user's table first and the packaged one after; None where neither names it.

    Raises WrongInput for a table that cannot be read.
    """
    tables = [_read(files("routesae.analyze.interpret").joinpath(PACKAGED).read_text(encoding="utf-8"), PACKAGED)]
    if prices_file is not None:
        try:
            written = Path(prices_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WrongInput(f"--prices {prices_file} cannot be read: {error}") from None
        tables.insert(0, _read(written, f"--prices {prices_file}"))
    for name in (model, SNAPSHOT.sub("", model)):
        for table in tables:
            if name in table:
                return table[name]
    return None


def _read(written: str, source: str) -> dict[str, Price]:
    try:
        models = tomllib.loads(written)
    except tomllib.TOMLDecodeError as error:
        raise WrongInput(f"{source} is no TOML: {error}") from None
    prices = {}
    for model, price in models.items():
        if not isinstance(price, dict) or price.keys() != {"input", "output"}:
            raise WrongInput(f'{source}: ["{model}"] needs input = … and output = …, US dollars a million tokens')
        for name, dollars in price.items():
            if type(dollars) not in (int, float) or not 0 <= dollars < MILLION:
                raise WrongInput(f"{source}: {name} of {model} is {dollars!r}, not US dollars a million tokens")
        prices[model] = Price(**price)
    return prices


class Budget:
    """What may still be spent. Without a price there is no limit, and no sum."""

    def __init__(self, price: Price | None, max_dollars: float | None):
        self.price, self.max_dollars = price, max_dollars
        self.spent = 0.0  # dollars, of answers and of what may have been charged without one
        self.reserved = 0.0  # dollars that the requests under way cost at most
        self.exhausted = False
        self._settled = asyncio.Condition()

    def charge(self, used: Used) -> None:
        if self.price is not None:
            self.spent += self.price.dollars(used)

    async def reserve(self, most: Used) -> bool:
        """Whether a request of at most so many tokens may start; waits while that hangs on those under way."""
        if self.price is None or self.max_dollars is None:
            return True
        dollars = self.price.dollars(most)
        async with self._settled:
            while self.spent + self.reserved + dollars > self.max_dollars:
                if not self.reserved or self.exhausted:
                    self.exhausted = True
                    self._settled.notify_all()
                    return False
                await self._settled.wait()
            self.reserved += dollars
        return True

    async def settle(self, most: Used, used: Used) -> None:
        """The request that `most` was reserved for has ended."""
        self.charge(used)
        if self.price is not None and self.max_dollars is not None:
            async with self._settled:
                self.reserved -= self.price.dollars(most)
                if self.reserved < 1e-12:  # what sums of floats leave
                    self.reserved = 0.0
                self._settled.notify_all()
