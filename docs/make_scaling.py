"""Write tables of pages from what ``estimate`` says: ``python docs/make_scaling.py``.

Tables stand between lines ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

from ghoststream import Compute, Method, Recovery, Search, Text
from ghoststream.cli.output import human_bytes
from ghoststream.costs import Need
from ghoststream.progress import human_seconds
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.machine import known_machines
from ghoststream.stages.estimation.models import find_model, shapes
from ghoststream.stages.estimation.report import Estimate, StageCost

PAGES = tuple(Path(__file__).with_name(name) for name in ("scaling.md", "one_gpu.md"))
SEQUENCES, LENGTH = 32, 2048
_NOTHING = Need(0, "")
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """Return the page with its tables made anew."""
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def _price(
    model: str,
    machine: str,
    *,
    remove: int | None = None,
    sequences: int = SEQUENCES,
    store: bool = False,
    device: str = "auto",
    operator: str | None = None,
) -> Estimate:
    layers = find_model(model).config["num_hidden_layers"]
    recovery = Recovery(
        remove=remove or layers // 5,
        calibration=Text(spec="ids:none.npy", sequences=sequences, length=LENGTH),
        search=Search(criterion="streamline-published") if store else Search(),
        method=Method(operator="ghost") if store else Method(operator=operator),
        compute=Compute(device=device),
    )
    return estimate(recovery, model=model, machine=machine)


def _table(headers: list[str], rows: Iterator[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shapes() -> str:
    def rows() -> Iterator[list[str]]:
        for name in shapes():
            found, model = find_model(name), _price(name, "h100").model
            count = sum(prod(entry.shape) for entry in found.index.tensors.values())
            acting = sum(layer.acting for layer in model.layers) + model.vocabulary * model.hidden
            states = SEQUENCES * LENGTH * model.hidden * model.itemsize
            yield [
                f"`{name}`",
                f"{count / 1e9:,.3g}",
                f"{acting / 1e9:,.3g}",
                f"{model.n_layers} x {model.hidden:,}",
                human_bytes(model.checkpoint_bytes),
                human_bytes(model.unit_bytes),
                human_bytes(states),
                human_bytes((model.n_layers + 1) * states),
            ]

    headers = ["shape", "parameters, 1e9", "acting, 1e9", "layers x C", "checkpoint", "U"]
    return _table([*headers, "states a position", "store of all"], rows())


def _machines(*, store: bool) -> str:
    def rows() -> Iterator[list[str]]:
        for name in shapes():
            yield [f"`{name}`", *(_time(_price(name, machine, store=store)) for machine in known_machines())]

    return _table(["shape", *known_machines()], rows())


def _time(found: Estimate) -> str:
    missing = dict.fromkeys(
        name.partition(",")[0] if name.startswith("memory") else name
        for name, need in found.needs.items()
        if not need.fits
    )
    longest = max(found.stages, key=lambda stage: stage.seconds or 0.0)
    said = f"{human_seconds(found.seconds or 0.0)} ({longest.name}: {longest.limited_by})"
    return f"{said}; too little {', '.join(missing)}" if missing else said


def _stages() -> str:
    def rows() -> Iterator[list[str]]:
        for store in (False, True):
            found = _price("llama-3-70b", "h100", remove=16, store=store)
            for stage in found.stages:
                yield ["published" if store else "default", *_stage(stage)]

    headers = ["method", "stage", "reads", "writes", "disk", "bus", "layers", "store", "fits", "time"]
    return _table(headers, rows())


def _stage(stage: StageCost) -> list[str]:
    seconds = [stage.parts[name] for name in ("disk", "bus", "compute", "writer", "solve")]
    return [
        stage.name,
        human_bytes(stage.read_bytes),
        human_bytes(stage.write_bytes),
        *(human_seconds(one) if one >= 0.05 else "-" for one in seconds),
        human_seconds(stage.seconds or 0.0),
    ]


def _tokens() -> str:
    def rows() -> Iterator[list[str]]:
        for sequences in (4, 32, 256, 2048):
            capture = _price("llama-3-70b", "h100", remove=16, sequences=sequences, store=True).stages[0]
            places = ", ".join(name for name, n_bytes in capture.states.items() if n_bytes)
            yield [f"{sequences * LENGTH:,}", places, *_stage(capture)[1:7], str(capture.limited_by)]

    headers = ["tokens", "states wait on", "reads", "writes", "disk", "bus", "layers", "store", "limited by"]
    return _table(headers, rows())


def _cards() -> str:
    def rows() -> Iterator[list[str]]:
        for name in ("llama-3-70b", "llama-3-405b"):
            for count in (1, 2, 4):
                cards = ",".join(f"cuda:{number}" for number in range(count))
                by_store, by_map, by_vector = (
                    _price(name, "h100", store=store, device=cards, **given)
                    for store, given in ((True, {}), (False, {}), (False, {"operator": "ghost"}))
                )
                yield [
                    f"`{name}`",
                    str(count),
                    *(_of_stage(found, "capture") for found in (by_store,)),
                    *(
                        _of_stage(found, stage)
                        for found in (by_map, by_vector)
                        for stage in ("search", "fit")
                    ),
                ]

    headers = ["shape", "cards", "published: capture", "default: search", "default: fit"]
    return _table([*headers, "`ghost`: search", "`ghost`: fit"], rows())


def _of_stage(found: Estimate, name: str) -> str:
    (stage,) = (one for one in found.stages if one.name == name)
    mine = {name, "merge"} if name == "fit" else {name}
    short = [need for need in mine if not found.needs.get(f"memory, {need}", _NOTHING).fits]
    said = f"{human_seconds(stage.seconds or 0.0)} ({stage.limited_by})"
    return f"{said}; too little memory" if short else said


def _one_gpu() -> Estimate:
    text = Text(spec="ids:none.npy", sequences=128, length=LENGTH)
    recovery = Recovery(remove=16, calibration=text, search=Search(held_out=32))
    return estimate(recovery, model="llama-3-70b", machine="h100")


def _one_gpu_needs() -> str:
    needs = _one_gpu().needs.items()
    rows = ([name, human_bytes(need.n_bytes), human_bytes(need.available or 0)] for name, need in needs)
    return _table(["need", "takes", "free"], rows)


def _one_gpu_stages() -> str:
    def rows() -> Iterator[list[str]]:
        for stage in _one_gpu().stages:
            places = ", ".join(f"{name} {human_bytes(size)}" for name, size in stage.states.items() if size)
            yield [*_stage(stage)[:3], places or "-", *_stage(stage)[3:]]

    headers = ["stage", "reads", "writes", "states wait on", "disk", "bus", "layers", "store", "fits", "time"]
    return _table(headers, rows())


TABLES: dict[str, Callable[[], str]] = {
    "shapes": _shapes,
    "default": lambda: _machines(store=False),
    "published": lambda: _machines(store=True),
    "stages": _stages,
    "tokens": _tokens,
    "cards": _cards,
    "one_gpu_needs": _one_gpu_needs,
    "one_gpu_stages": _one_gpu_stages,
}

if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
