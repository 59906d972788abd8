"""Which plans leave a model whose configuration can be written. Neither torch nor transformers is imported.

Some models tell the kinds of their layers by a period, which not every plan keeps (Jamba). A plan of several
spans may keep one where none of its spans does alone: only whole plans are left out. Where some layers have
attention, one of these has to stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.options import Search
from ghoststream.recovery.config_check import require_attention
from ghoststream.recovery.config_surgery import prune_config
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.criteria import MEASURED, make_search_criterion, races

if TYPE_CHECKING:
    from ghoststream.streaming import Skeleton

MOST_LOOKS = 20_000
"""Plans that are looked at, a few seconds long, before it is left open whether one can be written."""


def why_not_writable(skeleton: Skeleton, plan: PruningPlan) -> str:
    """Say why what is left of a model has no configuration, or does not run by it; empty if it does."""
    try:
        require_attention(skeleton.config, plan)
    except UnsupportedModelError as error:
        return str(error)
    return _why_no_config(skeleton, plan)


def _why_no_config(skeleton: Skeleton, plan: PruningPlan) -> str:
    try:
        prune_config(skeleton.config, plan)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def writable(skeleton: Skeleton, plans: Iterable[PruningPlan], most: int | None = None) -> list[PruningPlan]:
    """Return those plans whose model can be written, in their order; the first ``most`` of them."""
    return list(islice((plan for plan in plans if not why_not_writable(skeleton, plan)), most))


def writable_spans(skeleton: Skeleton, spans: Iterable[Span]) -> list[Span]:
    """Return those spans without which alone the model can be written, in their order."""
    plans = (PruningPlan(skeleton.n_layers, (span,)) for span in spans)
    return [plan.spans[0] for plan in writable(skeleton, plans)]


def of_any_spans(skeleton: Skeleton, tried: Sequence[Sequence[int]], most: int) -> list[PruningPlan]:
    """Return plans of several spans that can be written, whatever they cost; none touch.

    Args:
        skeleton: The model.
        tried: The sizes of the spans, for each partition of the layers to remove.
        most: How many plans at most.
    """
    looks = _looks(skeleton, [sizes for sizes in tried if len(sizes) > 1])
    return list(islice((plan for plan in looks if plan is not None), most))


def some_writable(
    skeleton: Skeleton, tried: Sequence[Sequence[int]], *, touch: bool = False
) -> PruningPlan | None:
    """Return a plan for checks: one that can be written, or one to be refused for what any is refused for.

    Args:
        skeleton: The model.
        tried: The sizes of the spans, for each partition of the layers to remove.
        touch: Whether spans may touch, which makes them one.

    Returns:
        The plan; None if there is none that can be written.
    """
    # The last layers can always go: what the configuration has against that, it has against everything.
    last = PruningPlan(skeleton.n_layers, (Span(skeleton.n_layers - sum(tried[0]), skeleton.n_layers),))
    if _why_no_config(skeleton, last):
        return last
    n_looks = 0
    for plan in _looks(skeleton, tried, touch=touch):
        if plan is not None:
            return plan
        n_looks += 1
    return last if n_looks == MOST_LOOKS else None


def _looks(
    skeleton: Skeleton, tried: Sequence[Sequence[int]], *, touch: bool = False
) -> Iterator[PruningPlan | None]:
    """Yield the plans that can be written, off the first and the last layer, and None for each other look."""
    looks = (look for sizes in tried for look in _behind(skeleton, (), sizes, touch=touch))
    return islice(looks, MOST_LOOKS)


def _behind(
    skeleton: Skeleton, spans: tuple[Span, ...], sizes: Sequence[int], *, touch: bool
) -> Iterator[PruningPlan | None]:
    """Yield the plans of these spans and of others of these sizes behind them that can be written.

    And None for every other look: what begins alike and cannot be written is one.
    """
    n_layers = skeleton.n_layers
    if not sizes:
        plan = PruningPlan(n_layers, spans)
        yield None if why_not_writable(skeleton, plan) else plan
        return
    apart = 0 if touch else 1
    first = spans[-1].stop + apart if spans else 1
    last = n_layers - 1 - sum(sizes) - apart * (len(sizes) - 1)
    for start in range(first, last + 1):
        # As the last layers can always go, what is left in front of them has to have a configuration.
        if _why_no_config(skeleton, PruningPlan(n_layers, (*spans, Span(start, n_layers)))):
            yield None
            return
        for size in sorted(set(sizes), reverse=True):
            others = list(sizes)
            others.remove(size)
            yield from _behind(skeleton, (*spans, Span(start, start + size)), others, touch=touch)


def example_plan(skeleton: Skeleton, remove: int, search: Search) -> PruningPlan:
    """Return a plan such as a search may choose, for checks.

    Raises:
        RequestError: If the criterion takes only plans that can be written, and there is none.
    """
    rule = make_search_criterion(search.criterion or MEASURED)
    tried = rule.tried(remove, search)
    if not tried:
        return some_plan(skeleton.n_layers, remove)
    plan = some_writable(skeleton, tried, touch=not races(search))
    if plan is None:
        if "max_spans" in rule.reads and search.max_spans < remove:
            removed, advice = f"{remove} layers in up to {search.max_spans} spans", " or a larger --max-spans"
        else:
            removed, advice = f"{remove} layers", ""
        raise none_writable(removed, f"give another number{advice}")
    return plan


def none_writable(removed: str, advice: str) -> RequestError:
    """Return the error to raise where no plan can be written.

    Args:
        removed: Which plans these are.
        advice: What to do.
    """
    return RequestError(
        f"no plan of {removed} leaves a model that can be written: the kinds of the layers that are left "
        f"come by no period, or none of them has attention; {advice}"
    )


def some_plan(n_layers: int, remove: int) -> PruningPlan:
    """Return a plan that removes so many layers: what is looked at where nobody knows yet which layers go."""
    return PruningPlan(n_layers, (Span(1, 1 + remove),))
