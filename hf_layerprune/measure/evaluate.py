"""The measure stage: evaluate a model and its base on tasks and texts, and write the numbers to the model's folder.

metrics = evaluate(EvalRequest("pruned", base="org/base", tasks=("paper",)))
"""

from __future__ import annotations

import logging
import math
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, LayerPruneError, boundary
from ..records.metrics import Metrics
from .answers import Answers
from .opening import open_measurement
from .paired import PairedDifference, compare_answers, compare_values, compare_windows
from .requests import EvalRequest
from .store import Store, now
from .subject import Subject, describe_device, describe_dtype
from .tasks import LocalText, TaskSet, read_tasks, task_set
from .texts import WIKITEXT2, Text, check_fits, check_same_tokens, find_text, windows

if TYPE_CHECKING:
    import torch
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .distance import Distance, Perplexity
    from .harness import TaskRun

logger = logging.getLogger(__name__)


def _tasks_of(request: EvalRequest) -> tuple[str, ...] | None:
    """The names of the tasks; `None` for all in the folder."""
    if request.tasks is not None or request.tasks_from is not None:
        return request.tasks
    return ("paper",) if request.texts is None else ()


def _texts_of(request: EvalRequest) -> list[Text]:
    if request.texts is not None:
        return [find_text(name) for name in request.texts]
    if request.tasks_from is not None:
        tasks = read_tasks(request.tasks_from).values()
        return [Text.of(task) for task in tasks if isinstance(task, LocalText)]
    return [find_text(WIKITEXT2)] if request.tasks is None else []


def evaluate(request: EvalRequest) -> Metrics:
    """Evaluate a model, and its base if one is given.

    Invalid requests are refused before a model is loaded, and results are written after each task.

    Args:
        request (`EvalRequest`): What to measure.

    Returns:
        `Metrics`: The numbers, including those that the file already had.

    Raises:
        CheckpointError: A model can't be read, or existing numbers belong to other weights.
        LayerPruneError: A task or text is not available, or the model and its base can't be compared.
    """
    model, base, store = open_measurement(request)
    texts = _texts_of(request)
    tokenizer = model.tokenizer()
    rows = {text.name: _rows(text, tokenizer, request, model, base) for text in texts}
    with task_set(_tasks_of(request), request.tasks_from) as tasks:
        if not tasks.tasks and not texts:
            raise LayerPruneError("there is nothing to measure: name tasks, or texts")
        _Evaluation(request, store, model, base, tokenizer, tasks).run(texts, rows)
    return store.metrics


def _rows(
    text: Text, tokenizer: PreTrainedTokenizerBase, request: EvalRequest, model: Subject, base: Subject | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A text as windows, and the settings to record with their results."""
    rows, begun = windows(text.text, tokenizer, request.length, request.windows)
    if (vocabulary := model.vocabulary()) is not None:
        check_fits(rows, vocabulary)
        theirs = base.vocabulary() if base else None
        if base is not None and theirs is not None and theirs != vocabulary:
            raise LayerPruneError(
                f"{model.name} has a vocabulary of {vocabulary} tokens and {base.name} one of {theirs}, so they can't be "
                "compared token by token; name the base that the model was made from, or omit the texts"
            )
    if base is not None:
        try:
            check_same_tokens(tokenizer, base.tokenizer(), text.text)
        except CheckpointError:
            logger.info("%s has no tokenizer, so it reads the tokens of the model's tokenizer", base.name)
    settings = {"length": request.length, "windows": len(rows), "starts_with_bos": begun}
    return rows, settings


class _Evaluation:
    """One run over all tasks and texts."""

    def __init__(
        self,
        request: EvalRequest,
        store: Store,
        model: Subject,
        base: Subject | None,
        tokenizer: PreTrainedTokenizerBase,
        tasks: TaskSet,
    ) -> None:
        self.request, self.store, self.tasks = request, store, tasks
        self.model, self.base, self.tokenizer = model, base, tokenizer
        self.answers = Answers(request.answers)
        self.where: dict[str, dict[str, str]] = {}

    def run(self, texts: list[Text], rows: dict[str, tuple[torch.Tensor, dict[str, Any]]]) -> None:
        """Measure everything."""
        live: Any = self._load(self.model)
        ours = self._run_tasks(self.model, live)
        if self.base is None:
            for text in texts:
                self._perplexity(text, live, *rows[text.name])
            return
        if not texts:
            live = None  # without texts, the two need not be in memory together
        dense = self._load(self.base)
        self._compare_tasks(ours, self._run_tasks(self.base, dense))
        for text in texts:
            self._distance(text, live, dense, *rows[text.name])

    @property
    def _dense(self) -> Subject:
        assert self.base is not None, "there is a base where two models are compared"
        return self.base

    def _load(self, subject: Subject) -> PreTrainedModel:
        model = subject.load(self.request.dtype, self.request.device)
        self.store.add_model(subject, model)
        self.where[subject.weights] = {"dtype": describe_dtype(model), "device": describe_device(model)}
        return model

    # --- tasks ----------------------------------------------------------------------------------------------

    def _run_tasks(self, subject: Subject, model: PreTrainedModel) -> dict[str, TaskRun]:
        if not self.tasks.tasks:
            return {}
        from .harness import Harness

        tokenizer = self.tokenizer if subject is self.model else self._base_tokenizer()
        harness, runs = None, {}
        for name, task in self.tasks.tasks.items():
            key = self._key(subject, name, task) if self.request.answers else {}
            run = self.answers.find(key)
            if run is None:
                harness = harness or Harness(model, tokenizer, self.request.batch_size, progress=self.request.progress)
                logger.info("%s: %s", subject.name, name)
                run = harness.run(name, task, limit=self.request.limit, shots=self.request.num_fewshot)
                self.answers.keep(key, run)
            runs[name] = run
            self.store.add(results=self._task_records(subject, name, run))
        return runs

    def _base_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.tokenizer if self._reads_with(self._dense) is self.model else self._dense.tokenizer()

    def _reads_with(self, subject: Subject) -> Subject:
        """The subject whose tokenizer a model uses: itself, or the pruned model if the base has none."""
        try:
            subject.tokenizer()
        except CheckpointError:
            return self.model
        return subject

    def _key(self, subject: Subject, name: str, task: Task | Group) -> dict[str, Any]:
        """Everything that the answers depend on."""
        from .harness import prompts_hash

        versions = self.store.versions
        return {
            "weights": subject.weights,
            "identity": subject.identity.parts,
            "tokenizer_of": self._reads_with(subject).identity.parts,
            "task": name,
            "prompts": prompts_hash(task, self.request.limit, self.request.num_fewshot),
            "dataset": self.tasks.datasets[name],
            "limit": self.request.limit,
            "num_fewshot": self.request.num_fewshot,
            "batch_size": self.request.batch_size,
            "versions": {name: versions.get(name) for name in ("lm-eval", "transformers", "torch")},
            **self.where[subject.weights],
        }

    def _settings(self, name: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"batch_size": self.request.batch_size, "chat_template": False}
        if self.request.limit is not None:
            settings["limit"] = self.request.limit
        if name in self.tasks.local:
            settings["local_file"] = True
        return settings

    def _task_records(self, subject: Subject, name: str, run: TaskRun) -> list[dict[str, Any]]:
        from .harness import SEED, kind_of

        records = []
        for metric, score in run.scores.items():
            record = {
                "weights": subject.weights,
                "kind": kind_of(metric),
                "task": name,
                "metric": metric,
                "value": score.value,
                "stderr": score.stderr,
                "higher_is_better": score.higher_is_better,
                "chance": run.chance if metric in ("acc", "acc_norm") else None,
                "samples": run.samples,
                "shots": run.shots,
                "seed": SEED,
                "task_version": run.version,
                "dataset": self.tasks.datasets[name],
                "settings": self._settings(name),
                "seconds": round(run.seconds, 3),
                **self.where[subject.weights],
            }
            records.append(record)
        return records

    def _compare_tasks(self, ours: dict[str, TaskRun], theirs: dict[str, TaskRun]) -> None:
        from .harness import kind_of

        for name, run in ours.items():
            for metric, score in run.scores.items():
                other = theirs[name].scores.get(metric)
                if other is None:
                    continue
                if score.outcomes and score.outcomes.keys() == other.outcomes.keys():
                    questions = list(score.outcomes)
                    difference = compare_answers(
                        [score.outcomes[q] for q in questions],
                        [other.outcomes[q] for q in questions],
                        run.chance if metric in ("acc", "acc_norm") else None,
                    )
                else:
                    difference = compare_values(score.value, other.value)
                self._add_comparison(kind_of(metric), name, metric, self._settings(name), difference)

    # --- texts ----------------------------------------------------------------------------------------------

    def _perplexity(self, text: Text, model: PreTrainedModel, rows: torch.Tensor, settings: dict[str, Any]) -> None:
        from .distance import perplexity

        start = perf_counter()
        with boundary(f"{text.name} can't be measured", kind=LayerPruneError):
            result = perplexity(model, rows, progress=self.request.progress)
        self.store.add(results=self._text_records(self.model, text, result, settings, perf_counter() - start))

    def _distance(
        self,
        text: Text,
        model: PreTrainedModel,
        base: PreTrainedModel,
        rows: torch.Tensor,
        settings: dict[str, Any],
    ) -> None:
        from .distance import distance

        start = perf_counter()
        with boundary(f"{text.name} can't be measured", kind=LayerPruneError):
            result = distance(model, base, rows, progress=self.request.progress)
        seconds = perf_counter() - start
        mine, dense = result.of_model, result.of_base
        results = self._text_records(self.model, text, mine, settings, seconds)
        results += self._text_records(self._dense, text, dense, settings, seconds)
        results += self._distance_records(text, result, settings, seconds)
        self.store.add(results=results)
        pairs = {
            "nll": compare_windows(mine.window_nll, dense.window_nll),
            "perplexity": compare_values(mine.perplexity, dense.perplexity),
        }
        for metric, comparison in pairs.items():
            self._add_comparison("text", text.name, metric, settings, comparison)

    def _text_records(
        self, subject: Subject, text: Text, result: Perplexity, settings: dict[str, Any], seconds: float
    ) -> list[dict[str, Any]]:
        values = {"perplexity": (result.perplexity, result.perplexity_stderr), "nll": (result.nll, result.nll_stderr)}
        return self._of_text(subject, "text", text, values, result.tokens, settings, seconds)

    def _distance_records(
        self, text: Text, result: Distance, settings: dict[str, Any], seconds: float
    ) -> list[dict[str, Any]]:
        values = {
            "kl": (result.kl, result.kl_stderr),
            "top1_agreement": (result.top1_agreement, result.top1_agreement_stderr),
        }
        return self._of_text(self.model, "distance", text, values, result.tokens, settings, seconds)

    def _of_text(
        self,
        subject: Subject,
        kind: str,
        text: Text,
        values: dict[str, tuple[float, float | None]],
        tokens: int,
        settings: dict[str, Any],
        seconds: float,
    ) -> list[dict[str, Any]]:
        records = []
        for metric, (value, stderr) in values.items():
            if not math.isfinite(value):
                logger.warning("%s: %s on %s is %s and is not recorded", subject.name, metric, text.name, value)
                continue
            record = {
                "weights": subject.weights,
                "kind": kind,
                "task": text.name,
                "metric": metric,
                "value": value,
                "stderr": stderr,
                "unit": {"nll": "nats per token", "kl": "nats per token"}.get(metric),
                "higher_is_better": metric == "top1_agreement",
                "samples": tokens,
                "dataset": text.dataset,
                "settings": settings,
                "seconds": round(seconds, 3),
                **self.where[subject.weights],
            }
            records.append(record)
        return records

    def _add_comparison(
        self, kind: str, task: str, metric: str, settings: dict[str, Any], difference: PairedDifference
    ) -> None:
        if not math.isfinite(difference.difference):
            return
        record = {
            "weights": self.model.weights,
            "base": self._dense.weights,
            "kind": kind,
            "task": task,
            "metric": metric,
            "settings": settings,
            **difference.fields(),
            "date": now(),
        }
        self.store.add(comparisons=[record])
