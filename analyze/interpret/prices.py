"""What a chat model's tokens cost, and a budget that counts requests under way at the most they can cost."""

import asyncio
import re
import tomllib
from importlib.resources import files
from typing import NamedTuple

from pydantic import BaseModel, Field, TypeAdapter

from routesae.machine.files import read_bytes, reading

MILLION = 1_000_000
SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")  # gpt-4o-2024-08-06 costs what gpt-4o costs


class Used(NamedTuple):
    """Tokens of prompts and of answers."""

    input: int = 0
    output: int = 0


class Price(BaseModel, frozen=True, strict=True, extra="forbid"):
    """US dollars a million tokens."""

    input: float = Field(ge=0, lt=MILLION)
    output: float = Field(ge=0, lt=MILLION)

    def dollars(self, used: Used) -> float:
        return (self.input * used.input + self.output * used.output) / MILLION


def price_of(model: str, prices_file: str | None) -> Price | None:
    """What `model` costs by the user's table, or else by the packaged one; None if neither names it.

    Raises WrongInput for a table that cannot be read.
    """
    table = TypeAdapter(dict[str, Price])
    packaged = files("routesae.analyze.interpret").joinpath("prices.toml").read_text(encoding="utf-8")
    prices = table.validate_python(tomllib.loads(packaged))
    if prices_file is not None:
        form = "it is TOML where a model has input and output, US dollars a million tokens"
        with reading(f"--prices {prices_file}", form):
            prices |= table.validate_python(tomllib.loads(read_bytes(prices_file).decode()))
    return prices.get(model, prices.get(SNAPSHOT.sub("", model)))


class Budget:
    """What may still be spent. There is no limit without a price and `max_dollars`."""

    def __init__(self, price: Price | None, max_dollars: float | None):
        self.price, self.max_dollars = price, max_dollars
        self.spent = 0.0  # dollars
        self.exhausted = False
        self._reserved: list[float] = []  # dollars that each request under way costs at most
        self._settled = asyncio.Event()

    def dollars(self, used: Used) -> float:
        return 0.0 if self.price is None else self.price.dollars(used)

    async def reserve(self, most: Used) -> bool:
        """Whether a request of at most so many tokens may start. Waits while that depends on those under way."""
        dollars = self.dollars(most)
        while self.max_dollars is not None and self.spent + sum(self._reserved) + dollars > self.max_dollars:
            self.exhausted = self.exhausted or not self._reserved
            if self.exhausted:
                self._settled.set()  # the others that wait need not either
                return False
            self._settled.clear()
            await self._settled.wait()
        self._reserved.append(dollars)
        return True

    def settle(self, most: Used, used: Used) -> None:
        """Charge what the request that `most` was reserved for has used."""
        self.spent += self.dollars(used)
        self._reserved.remove(self.dollars(most))
        self._settled.set()
