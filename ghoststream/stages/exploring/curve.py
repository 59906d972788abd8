"""The loss over the number of removed layers: where its knee is, where it breaks, and that in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[int, float]]
"""Numbers of removed layers, ascending, and the loss of each above the dense model's, in nats a token."""

_NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class Findings:
    """What a curve says.

    Attributes:
        cheap_up_to: Largest number of layers such that it, and every smaller one, costs less than the lower
            threshold; 0 if none does.
        breaks_at: First number of layers that costs more than the upper threshold; None if none does.
        knee: Number of layers at the knee; None where the curve has none.
    """

    cheap_up_to: int
    breaks_at: int | None
    knee: int | None


def find(curve: Curve, *, cheap: float, broken: float) -> Findings:
    """Read a curve.

    Args:
        curve: Numbers of layers and losses; the dense model, at 0 layers and 0 nats, is not among them.
        cheap: Loss below which layers are cheap.
        broken: Loss above which the model is broken.
    """
    up_to = 0
    for removed, gap in curve:
        if gap >= cheap:
            break
        up_to = removed
    breaks_at = next((removed for removed, gap in curve if gap > broken), None)
    return Findings(up_to, breaks_at, knee_of(curve))


def knee_of(curve: Curve) -> int | None:
    """Return where a curve is farthest below the straight line from the dense model to its last point.

    This is the knee of Kneedle (Satopaa, Albrecht, Irwin and Raghavan, "Finding a Kneedle in a Haystack",
    2011) for a curve that rises ever faster, without smoothing. Up to the knee a layer costs less than the
    average one, and behind it more. It depends on where the curve ends.

    Returns:
        The number of layers, of equals the smallest; None where no point is below the line.
    """
    if len(curve) < 2 or curve[-1][1] <= 0:
        return None
    last, highest = curve[-1]
    below = {removed: removed / last - gap / highest for removed, gap in curve[:-1]}
    knee = max(below, key=lambda removed: (below[removed], -removed))
    return knee if below[knee] > _NOTHING else None


def verdict(curve: Curve, findings: Findings, *, cheap: float, broken: float) -> str:
    """Return what a curve says in one sentence, for a reader."""
    costs = dict(curve)
    last = curve[-1][0]
    up_to = findings.cheap_up_to
    parts = [
        f"up to {_layers(up_to)} cost{'s' * (up_to == 1)} less than {cheap:g} nats"
        if up_to
        else f"no number that was tried costs less than {cheap:g} nats"
    ]
    shown = {up_to}
    if findings.knee is not None and findings.knee not in shown:
        parts.append(f"the knee is at {findings.knee}, which cost {costs[findings.knee]:.2f}")
        shown.add(findings.knee)
    elif findings.knee is not None:
        parts.append("the knee is there too")
    if findings.breaks_at is not None:
        parts.append(f"it breaks at {findings.breaks_at}, which cost {costs[findings.breaks_at]:.2f}")
    else:
        parts.append(f"none breaks it: {last} cost {costs[last]:.2f}, and it breaks above {broken:g}")
    return "; ".join(parts)


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"
