"""The page: one HTML file that holds everything it shows, and neither runs nor loads anything."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from orpo_trl.diagnosis import diagnose
from orpo_trl.metrics import number
from orpo_trl.report import draw, evaluation_figures
from orpo_trl.report.answers import earlier_cards, last_cards
from orpo_trl.report.evaluations import compare, parts
from orpo_trl.report.figures import FIGURES
from orpo_trl.report.published import anchors, source
from orpo_trl.report.run import Run
from orpo_trl.report.tables import differences, facts, groups, summary

TEMPLATE = "page.html.jinja"
# The paper's value and the default of both trainers, for a run that did not record its own.
_BETA = 0.1
_SIGNS: dict[str, str] = dict(zip(draw.MARKERS, "●■▲◆▼✚✖", strict=True))


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    runs = list(runs)
    return environment.get_template(TEMPLATE).render(
        runs=[(run, *_sign(index)) for index, run in enumerate(runs)],
        signs={run.name: _sign(index) for index, run in enumerate(runs)},
        summary=summary(runs),
        findings={run.name: _findings(run) for run in runs},
        pictures=[_picture(draw, name, runs) for name in draw.drawable(runs)],
        published=source() if any(anchors(name, runs) for name in FIGURES) else "",
        is_thinned=any(len(run.training("loss")[0]) > draw.MANY_POINTS for run in runs),
        window=f"{draw.WINDOW:.1%}",
        has_several_sets=any(len(run.prefixes) > 1 for run in runs),
        differences=differences(runs),
        groups=groups(runs),
        evaluations=compare(runs),
        parts=parts(runs),
        evaluation_pictures=[_picture(evaluation_figures, name, runs) for name in evaluation_figures.drawable(runs)],
        cards=last_cards(runs),
        earlier={run.name: earlier_cards(run) for run in runs},
        facts={run.name: facts(run) for run in runs},
        preparation={run.name: run.preparation_texts() for run in runs},
    )


def _sign(index: int) -> tuple[str, str]:
    """Colour of a run, and its marker as a letter."""
    color, marker = draw.look(index)
    return color, _SIGNS[marker]


def _findings(run: Run) -> list[str]:
    warmup, steps = (int(number(run.record.get(key)) or 0) for key in ("warmup_steps", "max_steps"))
    history = [log for log in run.history if number(log.get("step")) is not None]
    beta = _BETA if run.beta is None else run.beta
    return list(diagnose(history, beta, warmup, steps, run.prepared_pairs()).values())


def _picture(room: ModuleType, name: str, runs: list[Run]) -> dict[str, str]:
    """A figure of `draw` or of `evaluation_figures`."""
    svg = draw.to_bytes(room.draw(name, runs), "svg")
    return {
        "source": f"data:image/svg+xml;base64,{b64encode(svg).decode()}",
        "text": room.description(name, runs),
        "caption": room.caption(name, runs),
    }
