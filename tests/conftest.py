"""A tiny random Llama, a tokenizer trained here, a corpus and caches made with them: what most tests start from."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.settings import BlockOptions
from routesae.harvest.cache.store import blocks
from routesae.harvest.cache.store import bucket as remote
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.tests.object_store import BUCKET, Proxy, proxy_before, s3_server
from routesae.train.settings import TrainSettings, settings_of

WORDS = re.findall(
    r"\w+", "the a router layer token hidden state latent dictionary sparse model block reads writes shard row"
)
WIDTH, DEPTH, CONTEXT = 32, 6, 16


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small lose more to a second thread than they gain, many times over on a busy machine.

    Session-scoped, so that fixtures are made as their tests run: the number of threads is part of the rounding. The
    commands that tests start as processes have one thread too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """How a test changes the number of threads: it is what it was when the test is over, however that ends."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of 30 to 90 random words, all longer than 100 characters."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(30, 90))) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 6 blocks, width 32, and a byte-level BPE tokenizer with a BOS and an EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(50), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,  # large enough that blocks matter to the loss
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 120 documents."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(120)))
    return path


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, tiny_corpus: Path) -> Callable[..., HarvestSettings]:
    """Settings of a small harvest: 4 shards of 2,048 tokens and a shorter fifth, layers 2 to 5 of 6."""

    def settings(**changes: Any) -> HarvestSettings:
        defaults: dict[str, Any] = {
            "model": str(tiny_model),
            "data": str(tiny_corpus),
            "tokens": 9000,
            "context": CONTEXT,
            "shard_tokens": 2048,
            "layers": "2-5",
            "device": "cpu",
            "lm_dtype": "float32",  # on every machine
        }
        return HarvestSettings(**{**defaults, **changes})

    return settings


@pytest.fixture(scope="session")
def tiny_cache(tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A finished cache; tests must not change it (copy its folder first)."""
    return harvest(tiny_settings(out=str(tmp_path_factory.mktemp("cache") / "shards")))


@pytest.fixture(scope="session")
def int8_cache(tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same tokens with --dtype int8; tests must not change it either."""
    return harvest(tiny_settings(out=str(tmp_path_factory.mktemp("int8") / "shards"), dtype="int8"))


@pytest.fixture
def begun(tiny_cache: Cache, tmp_path: Path) -> Path:
    """A copy of the finished cache."""
    return Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))


@pytest.fixture
def settings(tiny_cache: Cache, tmp_path: Path) -> Callable[..., TrainSettings]:
    """A run of 8 or 9 steps on 7,000-odd tokens, into tmp_path/saes, a topk unless another `sae` is given."""

    def make(**changes: Any) -> TrainSettings:
        given: dict[str, Any] = {
            "cache": str(tiny_cache.path),
            "sae": "topk",
            "latents": 64,
            "k": 8,
            "batch_tokens": 1000,
            "log_every_steps": 3,
            "lr": 3e-3,
            "device": "cpu",
            "out": str(tmp_path / "saes"),
        }
        return settings_of({**given, **changes})

    return make


@pytest.fixture(scope="session")
def s3_behind() -> Iterator[tuple[str, int]]:
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_behind: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An S3 that this process's environment names, seen through a proxy; blocks are kept below tmp_path/blocks."""
    with proxy_before(s3_behind) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-never-shown")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setattr(remote, "REQUEST_TIMEOUT", timedelta(seconds=1))
        monkeypatch.setattr(remote, "RETRIES", 2)
        monkeypatch.setattr(blocks, "options", BlockOptions(cache_dir=tmp_path / "kept"))
        yield proxy


@pytest.fixture
def s3_url(tmp_path: Path) -> str:
    """A place in the bucket that no other test uses."""
    return f"s3://{BUCKET}/{tmp_path.name}/shards"
