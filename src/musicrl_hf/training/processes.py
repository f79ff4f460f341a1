"""What several processes have to do together, so that they end where one would."""

from accelerate import PartialState
from accelerate.utils import gather
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
