"""What a finished step is to others: a token's output, the step's figures. Changes nothing."""

from quickchange_server.engine.observer import StepKind, StepStats, StepWeights
from quickchange_server.engine.request import FinishReason, TokenOutput
from quickchange_server.engine.sampler import Sample
from quickchange_server.engine.scheduler import ScheduledStep
from quickchange_server.engine.sequence import Sequence


def token_output(sequence: Sequence, sample: Sample, *, is_first: bool) -> TokenOutput:
    """Return what one new token is to its request, and whether it is the last."""
    token_id = sample.token_id
    assert token_id is not None
    reason: FinishReason | None = None
    if token_id in sequence.end_ids:
        reason = "stop"
    elif sequence.num_generated >= sequence.request.max_tokens:
        reason = "length"
    first, arrival = sequence.first_token_s, sequence.arrival_s
    assert first is not None
    assert sequence.scheduled_s is not None
    has_prompt_logprobs = is_first and sequence.request.prompt_logprobs is not None
    return TokenOutput(
        sequence.request_id,
        (token_id,),
        reason,
        stop_token_id=token_id if reason == "stop" else None,
        logprobs=None if sample.logprobs is None else (sample.logprobs,),
        prompt_logprobs=tuple(sequence.prompt_logprobs) if has_prompt_logprobs else None,
        num_cached_tokens=sequence.num_cached,
        queue_s=sequence.scheduled_s - arrival if is_first else None,
        ttft_s=first - arrival if is_first else None,
    )


def stats_of(step: ScheduledStep, seconds: float, *, is_merged: bool, is_ahead: bool) -> StepStats:
    """Return what an observer is told of a step."""
    digests = {ref.digest for row in step.rows for ref in row.sequence.request.adapters}
    weights: StepWeights = "merged" if is_merged else "unmerged" if digests else "base"
    return StepStats(
        kind_of(step),
        weights,
        seconds,
        len(step.rows),
        step.num_tokens,
        len(digests),
        step.num_preempted,
        step.prefix_queries,
        step.prefix_hits,
        is_ahead,
    )


def kind_of(step: ScheduledStep) -> StepKind:
    """Say whether a step decodes, computes prompts, or both."""
    num_decode = sum(row.num_tokens == 1 for row in step.rows)
    if num_decode == len(step.rows):
        return "decode"
    return "mixed" if num_decode else "prefill"
