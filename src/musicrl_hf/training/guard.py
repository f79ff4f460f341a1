"""A guard against over-optimisation: stop when what is watched no longer rises, and end with the best policy.

A policy that is pushed on earns ever more of the reward that it is trained on, and from some point less of what that reward
stands for (Gao et al. 2022, arXiv:2210.10760). A reward that it is not trained on can show where.

The best checkpoint is kept, and gone back to, by transformers' Trainer (`load_best_model_at_end`). Its EarlyStoppingCallback
counts in memory: a run that is resumed would begin to count anew, or, with `restore_callback_states_from_checkpoint`, go on with the
patience that it was started with, whatever is asked for. Here everything follows from the log in `trainer_state.json`.
"""

from collections.abc import Sequence

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def has_stalled(values: Sequence[float], patience: int, min_delta: float = 0.0) -> bool:
    """Whether none of the last `patience` values lies more than `min_delta` above the best before them.

    Example:
        >>> has_stalled([0.1, 0.4, 0.3, 0.4], patience=2)
        True
        >>> has_stalled([0.1, 0.4, 0.3, 0.5], patience=2)
        False
    """
    before, last = values[:-patience], values[-patience:]
    return len(before) > 0 and max(last) <= max(before) + min_delta


class OverOptimisationGuard(TrainerCallback):
    """Stop when a metric of the evaluations has not risen for `patience` of them.

    For a Trainer with `load_best_model_at_end` and this `metric_for_best_model`, which then goes back to the weights of the
    best evaluation. That before the first step counts, where there is one.

    Args:
        metric: as it is logged, such as "eval_watch/quality"; higher is better.
        patience: evaluations, at least 1.
        min_delta: a rise is more than this above the best before, in the metric's own unit; at least 0.

    Raises:
        ValueError: as training begins, where a run is resumed that kept its best checkpoint by another metric, or none.
        FileNotFoundError: as training begins, where the best checkpoint of a resumed run is gone.
    """

    def __init__(self, metric: str, patience: int = 3, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1 evaluation, got {patience!r}.")
        if not 0 <= min_delta < float("inf"):
            raise ValueError(f"`min_delta` must be at least 0, got {min_delta!r}.")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        evaluations = self._evaluations(state)
        best_step, best = max(evaluations, key=lambda found: found[1], default=(None, None))
        if (best_step, best) != (state.best_global_step, state.best_metric):
            raise ValueError(
                f"`resume_from_checkpoint`: that run did not keep its best checkpoint by `{self.metric}`; resume it with the "
                "guard that it was started with, or start anew."
            )
        if best_step is not None and state.best_model_checkpoint is None:
            raise FileNotFoundError(
                f"`resume_from_checkpoint`: the best weights so far are those of step {best_step}, and their checkpoint is no "
                f"longer where that run left it; put checkpoint-{best_step} back, or start anew."
            )
        control.should_training_stop |= self._stalled(evaluations)  # resumed after it had been stopped

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if control.should_training_stop and self._stalled(self._evaluations(state)):
            # The Trainer makes one step before it looks whether to stop: it must not become the best.
            control.should_evaluate = control.should_save = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._stalled(self._evaluations(state)):
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(
                    f"{self.metric} has risen by no more than {self.min_delta:g} in {self.patience} evaluations: stopping at "
                    f"step {state.global_step}."
                )

    def _evaluations(self, state: TrainerState) -> list[tuple[int, float]]:
        return [(line["step"], line[self.metric]) for line in state.log_history if self.metric in line]

    def _stalled(self, evaluations: list[tuple[int, float]]) -> bool:
        return has_stalled([value for _, value in evaluations], self.patience, self.min_delta)
