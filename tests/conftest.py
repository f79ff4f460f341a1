import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import gc

import pytest
import stores
import torch
import trl  # noqa: F401

from musicrl_hf.collect.store import VoteStore

torch.set_num_threads(1)

# Trainers collect garbage at every step: what the imports left behind need not be looked through each time.
gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=stores.KINDS)
def place(request, tmp_path):
    """Where a store of each kind can be: the arguments of `VoteStore`."""
    with stores.place_for_store(request.param, tmp_path) as where:
        yield where


@pytest.fixture
def store(place):
    store = VoteStore(*place)
    yield store
    store.close()


@pytest.fixture
def clock():
    return stores.Clock()
