"""Run folders as a trainer leaves them, and pages read back."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

MISTRAL = "mistralai/Mistral-7B-v0.1"


def metrics(step: int, beta: float = 0.1, prefix: str = "") -> dict:
    """Metrics that belong together: rewards are beta times the log-probabilities."""
    chosen, rejected = -1.0 + step / 1000, -1.2
    return {
        f"{prefix}loss": 1.5 - step / 1000,
        f"{prefix}nll_loss": 1.4 - step / 1000,
        f"{prefix}log_odds_chosen": 0.3,
        f"{prefix}log_odds_ratio": -0.55,
        f"{prefix}odds_ratio_delta": 0.42,
        f"{prefix}logps/chosen": chosen,
        f"{prefix}logps/rejected": rejected,
        f"{prefix}rewards/chosen": beta * chosen,
        f"{prefix}rewards/rejected": beta * rejected,
        f"{prefix}rewards/margins": beta * (chosen - rejected),
        f"{prefix}rewards/accuracies": 0.625,
    }


def history(steps: int = 6, beta: float = 0.1, labels: tuple[str, ...] = ("",)) -> list[dict]:
    logs = []
    for step in range(1, steps + 1):
        logs.append(
            {
                "step": step, "epoch": step / steps, **metrics(step, beta), "grad_norm": 1.0 + step,
                "learning_rate": 5e-6, "throughput/unique_tokens_per_second": 2000.0 + step, "memory/peak_gib": 3.5,
            }
        )  # fmt: skip
        if step % 3 == 0:
            for label in labels:
                prefix = f"eval_{label}_" if label else "eval_"
                evaluation = {**metrics(step, beta, prefix), f"{prefix}runtime": 1.5}
                logs.append({"step": step, "epoch": step / steps, **evaluation})
    return logs


def write_lines(path: Path, records: list[dict], end: str = "\n") -> None:
    path.write_text("\n".join(map(json.dumps, records)) + end, encoding="utf-8")


def write_run(folder: Path, logs: list[dict] | None = None, samples: list[dict] | None = None, **files: object) -> Path:
    """A run's folder. `recipe`: its text; `run`, `preparation`: objects; where they are absent, so is the file."""
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", history() if logs is None else logs)
    if samples is not None:
        write_lines(folder / "samples.jsonl", samples)
    for name, content in files.items():
        if name == "recipe":
            (folder / "recipe.yaml").write_text(str(content), encoding="utf-8")
        else:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def sample(step: int = 3, **fields: object) -> dict:
    defaults = {"dataset": "eval", "prompt": "a prompt", "completion": "an answer", "chosen": "good", "rejected": "bad"}
    return {"step": step, **defaults, **fields}


class Page(HTMLParser):
    """Text, elements and attributes of a page; an element's own text by its class or tag."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []  # name of the enclosing element or its class, and text
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in ("meta", "link", "img"):
            self._open.append(attributes.get("class") or tag)
            self.texts.append((self._open[-1], ""))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if self._open and self.texts[-1][0] == self._open[-1]:
            self.texts[-1] = (self._open[-1], self.texts[-1][1] + data)
        elif self._open:
            self.texts.append((self._open[-1], data))

    def of(self, name: str) -> list[str]:
        return [text for found, text in self.texts if found == name]

    @property
    def text(self) -> str:
        return "".join(text for name, text in self.texts if name != "style")

    @property
    def skeleton(self) -> list[tuple]:
        """Elements and the names of their attributes, without what they say."""
        return [(tag, tuple(attributes)) for tag, attributes in self.elements]

    def rows(self) -> dict[str, list[str]]:
        """Rows of tables whose first cell is a header: its text, and the texts of the cells after it."""
        found: dict[str, list[str]] = {}
        name = ""
        for kind, text in self.texts:
            if kind in ("th", "bdi", "code"):
                name = text or name
            elif kind == "td":
                found.setdefault(name, []).append(text)
        return found


def close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-9)
