import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import gc

import pytest
import torch
import trl  # noqa: F401

torch.set_num_threads(1)

# Trainers collect garbage at every step: what the imports left behind need not be looked through each time.
gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
