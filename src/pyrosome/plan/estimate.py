"""How fast a plan is: the time of a step and of a prompt, as bands of tokens per second.

A session's rate is the step's, times the tokens a step gives: one, and those drafts that were accepted.
"""

from __future__ import annotations

from pyrosome.plan import speed
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.memory import num_drafts, step_tokens
from pyrosome.plan.plan import Asked, Band, Speed

# Share of first drafts that are accepted.  DeepSeek-V3's report has 85 to 90% for its MTP stage; free prose and other
# languages give less.
ACCEPTED = Band(0.5, 0.75, 0.9)


def estimated(asked: Asked, layout: Layout, placement: Placement) -> Speed:
    """Rates at the asked load: all sessions decode at the end of their context; one prompt at a time is computed.

    Raises:
        PlanError: a bandwidth or rate that decides is not known.
    """
    c = speed.coefficients_for(asked.machine)
    low, high = c.band

    def decode(drafts: int) -> speed.StepTime:
        load = speed.Load(
            asked.sessions, 1 + drafts, asked.context - 1, asked.kv_format, head_rows=1 + drafts, drafts=drafts
        )
        return speed.step_time(asked.model, asked.machine, layout, placement, load, c)

    plain = decode(0)
    step, given = plain, Band(1.0, 1.0, 1.0)
    if num_drafts(asked):  # the engine drafts where it pays
        drafted = decode(1)
        if (1 + ACCEPTED.mid) / drafted.seconds > 1 / plain.seconds:
            step, given = drafted, Band(1 + ACCEPTED.low, 1 + ACCEPTED.mid, 1 + ACCEPTED.high)
    each = Band(given.low / (step.seconds * high), given.mid / step.seconds, given.high / (step.seconds * low))
    tokens = asked.prompt or asked.context
    prompt = speed.prompt_time(
        asked.model, asked.machine, layout, placement, tokens, c, cached=asked.context - tokens,
        step_tokens=step_tokens(asked), kv_format=asked.kv_format,
    )  # fmt: skip
    first = prompt.seconds
    return Speed(
        decode_tok_s=each,
        total_tok_s=Band(*(asked.sessions * rate for rate in (each.low, each.mid, each.high))),
        prefill_tok_s=Band(tokens / (first * high), tokens / first, tokens / (first * low)),
        first_token_s=Band(first * low, first, first * high),
        limit=step.limit,
        source=c.source,
        decode_parts_s=dict(step.parts),
        prefill_parts_s=dict(prompt.parts),
    )
