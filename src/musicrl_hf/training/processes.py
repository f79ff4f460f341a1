"""What several processes have to do together, so that they end where one would."""

import gc
import os
from collections.abc import Callable
from typing import Any

import torch.distributed
from accelerate import PartialState
from accelerate.utils import gather, parse_flag_from_env
from datasets import Dataset
from torch import Tensor

from ..rewards import CombinedReward


def combine_over_processes(reward: CombinedReward, components: dict[str, Tensor]) -> Tensor:
    """The combined scores [B] of this process's clips, normalised over those of all processes.

    Args:
        reward: what combines.
        components: as `reward.components` gives them on this process; every process has as many clips.
    """
    state = PartialState()
    clips = len(next(iter(components.values())))
    everyone = {name: gather(scores.to(state.device)).cpu() for name, scores in components.items()}
    return reward.combine(everyone)[state.process_index * clips :][:clips]


def encode_in_shares(encode: Callable[[Dataset, range], Any], *parts: Dataset) -> None:
    """Each process encodes the clips of its share of the rows, and all go on once they are encoded; one alone does nothing here.

    Args:
        encode: of a data set, these rows' clips into a cache that the processes share.
        parts: the data sets.
    """
    state = PartialState()
    if state.num_processes == 1:  # it encodes what it reads
        return
    for ds in parts:
        first, last = (len(ds) * (state.process_index + side) // state.num_processes for side in (0, 1))
        encode(ds, range(first, last))
    state.wait_for_everyone()


def shares_out_weights() -> bool:
    """Has no process the whole policy, as under FSDP and ZeRO-3? `accelerate launch` tells it by the environment."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def end_processes() -> None:
    """The last call of a script that trained on several processes; where there is one, nothing happens.

    Ends the process group and the threads that carried its messages. A data-parallel model that is not collected yet
    keeps those threads alive, and one that outlives the interpreter can abort the process after all is saved: call this
    where no variable holds a trainer any more.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # trainers and what they wrap point at each other
